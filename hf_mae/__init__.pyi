# The only list of public names: `hf_mae.NAME`, imported on first use. __init__.py and type checkers read this file.
from .backbone_mae import MAEBackbone as MAEBackbone
from .classifier_mae import MAEForImageClassification as MAEForImageClassification
from .configuration_mae import SIZES as SIZES
from .configuration_mae import MAEConfig as MAEConfig
from .conversion.layouts import to_layout as to_layout
from .data.decode import decode_image as decode_image
from .data.loader import TrainingStream as TrainingStream
from .data.loader import each_batch as each_batch
from .data.loader import make_loader as make_loader
from .data.order import Rows as Rows
from .data.order import StreamPlan as StreamPlan
from .data.prepare import prepare as prepare
from .data.sources import open_source as open_source
from .data.transform import ImageSpec as ImageSpec
from .data.transform import crop_settings as crop_settings
from .errors import UserError as UserError
from .evaluation.metrics import Top1 as Top1
from .evaluation.metrics import Top5 as Top5
from .evaluation.metrics import make_compute_metrics as make_compute_metrics
from .image_processing_mae import MAEImageProcessor as MAEImageProcessor
from .image_processing_pil_mae import MAEImageProcessorPil as MAEImageProcessorPil
from .keys.data_keys import PrepareRecipe as PrepareRecipe
from .keys.finetune_keys import FinetuneRecipe as FinetuneRecipe
from .keys.run_keys import PretrainRecipe as PretrainRecipe
from .masking_mae import patchify as patchify
from .masking_mae import unpatchify as unpatchify
from .modeling_mae import MAEForPreTraining as MAEForPreTraining
from .modeling_mae import MAEModel as MAEModel
from .modeling_mae import mae_vit_base as mae_vit_base
from .modeling_mae import mae_vit_huge as mae_vit_huge
from .modeling_mae import mae_vit_large as mae_vit_large
from .modeling_mae import mae_vit_small as mae_vit_small
from .modeling_mae import mae_vit_tiny as mae_vit_tiny
from .optim.groups import adamw as adamw
from .optim.groups import layer_decay_groups as layer_decay_groups
from .optim.groups import parameter_groups as parameter_groups
from .optim.schedule import lr_at as lr_at
from .training.build import model_config_of as model_config_of
from .training.devices import tune_for_device as tune_for_device
from .training.finetune import finetune as finetune
from .training.finetune import trainer_parts as trainer_parts
from .training.pretrain import pretrain as pretrain
from .visualize.grid import reconstruction_grid as reconstruction_grid
from .visualize.reconstruction import reconstruct as reconstruct

__version__: str

def register() -> None: ...
