"""Save and push a model or an image processor with the code that loads it where this package isn't installed.

transformers reads `auto_map` in a repository: Auto class -> "file.Class". It searches that file's text for relative
imports to find the other files. So one file imports the classes of all Auto classes, and `auto_map` names only that
file. Loading any class then brings all files, and they can be saved again.
"""

# The mixins call methods of transformers' classes, which follow them in the list of bases:
# pyright: reportAttributeAccessIssue=false

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files


def code_files(index: str) -> list[Path]:
    """The file `index`.py in this folder, and all files of this folder that it imports."""
    file = Path(__file__).with_name(f"{index}.py")
    return [file, *map(Path, get_relative_import_files(file))]


def auto_map(index: str) -> dict[str, Any]:
    """Auto class -> "file.Class", or {backend: "file.Class"} for image processors; from `AUTO_CLASSES` of `index`."""

    def where(target: Any) -> Any:
        if isinstance(target, dict):
            return {name: where(one) for name, one in target.items()}
        return f"{index}.{target.__name__}"

    return where(import_module(f".{index}", __package__).AUTO_CLASSES)


class SavedWithCode:
    """`save_pretrained` and `push_to_hub` of transformers, with or without the code."""

    def save_pretrained(self, save_directory: Any, *args: Any, with_code: bool = False, **kwargs: Any) -> Any:
        """Save as in transformers, optionally with the code that loads it where this package isn't installed.

        Args:
            save_directory: folder to save to.
            with_code: also save the code, and name it in the JSON file for each Auto class. Without it the JSON file
                doesn't mention code, even if the model was loaded with code. Classes that `register_for_auto_class`
                registered are always saved with code; transformers calls it when it loads such code.
            *args, **kwargs: as in transformers; `push_to_hub=True` saves the code too.
        """
        with self._saving_code(with_code or bool(kwargs.get("push_to_hub"))):
            return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Push as in transformers, with the code that loads it where this package isn't installed."""
        with self._saving_code(True):
            return super().push_to_hub(*args, **kwargs)

    def _saving_code(self, with_code: bool) -> AbstractContextManager[None]:
        """A context that saves code if wanted, or if the class is registered. A model leaves this to its config."""
        return self.config._saving_code(with_code or self._auto_class is not None)


class NamesCode(SavedWithCode):
    """For configurations and image processors: writes `auto_map` into the JSON file, and the code beside it."""

    code_index: str
    auto_class: str

    @property
    def _saves_code(self) -> bool:
        return "_auto_class" in vars(self)

    @contextmanager
    def _saving_code(self, with_code: bool) -> Iterator[None]:
        if self._saves_code or not (with_code or self._auto_class):
            yield
            return
        # transformers writes entries into `auto_map` while it saves. Entries of a loaded file must not mix with them.
        loaded = vars(self).pop("auto_map", None)
        self._auto_class = self.auto_class
        try:
            yield
        finally:
            for name in ("_auto_class", "auto_map"):
                vars(self).pop(name, None)
            if loaded is not None:
                self.auto_map = loaded

    def to_dict(self) -> dict[str, Any]:
        """The settings for the JSON file; with `auto_map` only if code is saved beside it."""
        settings = super().to_dict()
        settings.pop("_auto_class", None)
        named = settings.pop("auto_map", None) or {}
        if self._saves_code:
            # The author of a derived class registers it, and transformers copies its file.
            ours = {file.stem for file in code_files(self.code_index)}
            derived = {name: where for name, where in named.items() if where.split(".")[0] not in ours}
            settings["auto_map"] = auto_map(self.code_index) | derived
        return settings

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the file as in transformers, and the code beside it if `auto_map` names it."""
        super().to_json_file(json_file_path, *args, **kwargs)
        if self._saves_code:
            for file in code_files(self.code_index):
                shutil.copyfile(file, Path(json_file_path).with_name(file.name))
