"""The code that loads a model or an image processor where this package isn't installed: saved and pushed with it.

In a repository transformers looks up `auto_map`, Auto class -> "file.Class". It finds the other files that this file
needs by searching its text for relative imports. One file therefore imports the classes of all Auto classes, and
`auto_map` names nothing else: whichever class is loaded, all of the files arrive, and can be saved again.
"""

# The mixins call methods of transformers' classes, which come after them in the order of bases:
# pyright: reportAttributeAccessIssue=false

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files


def code_files(index: str) -> list[Path]:
    """The file of that name beside this one, and all that it imports from there."""
    file = Path(__file__).with_name(f"{index}.py")
    return [file, *map(Path, get_relative_import_files(file))]


def auto_map(index: str) -> dict[str, Any]:
    """Auto class -> "file.Class", of image processors {backend: "file.Class"}, from `AUTO_CLASSES` of the index."""

    def where(target: Any) -> Any:
        if isinstance(target, dict):
            return {name: where(one) for name, one in target.items()}
        return f"{index}.{target.__name__}"

    return where(import_module(f".{index}", __package__).AUTO_CLASSES)


class SavedWithCode:
    """`save_pretrained` and `push_to_hub` of transformers, with or without the code."""

    def save_pretrained(self, save_directory: Any, *args: Any, with_code: bool = False, **kwargs: Any) -> Any:
        """transformers' own, with or without the code that loads it where this package isn't installed.

        Args:
            save_directory: folder.
            with_code: save the code too, and say in the JSON file what each Auto class finds in it. A folder without
                code doesn't mention any, even if it was loaded from one with code. Classes that are registered by
                `register_for_auto_class`, as transformers does when it loads such code, are always saved with it.
            *args, **kwargs: as in transformers; `push_to_hub=True` saves the code too.
        """
        with self._saving_code(with_code or bool(kwargs.get("push_to_hub"))):
            return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """transformers' own, with the code that loads it where this package isn't installed."""
        with self._saving_code(True):
            return super().push_to_hub(*args, **kwargs)

    def _saving_code(self, with_code: bool) -> AbstractContextManager[None]:
        """While it lasts, code is saved if it is wanted or if the class is registered. A model's config sees to it."""
        return self.config._saving_code(with_code or self._auto_class is not None)


class NamesCode(SavedWithCode):
    """For a configuration and an image processor: `auto_map` in their JSON file, and the code beside it."""

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
        # transformers writes its own entries into `auto_map` meanwhile. Those of a loaded file are none of ours.
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
        """The settings as the JSON file holds them; `auto_map` only where code is saved beside it."""
        settings = super().to_dict()
        settings.pop("_auto_class", None)
        named = settings.pop("auto_map", None) or {}
        if self._saves_code:
            # A class derived from ours is registered by its author, and its file is copied by transformers.
            ours = {file.stem for file in code_files(self.code_index)}
            derived = {name: where for name, where in named.items() if where.split(".")[0] not in ours}
            settings["auto_map"] = auto_map(self.code_index) | derived
        return settings

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own, and the code beside the file if `auto_map` names it."""
        super().to_json_file(json_file_path, *args, **kwargs)
        if self._saves_code:
            for file in code_files(self.code_index):
                shutil.copyfile(file, Path(json_file_path).with_name(file.name))
