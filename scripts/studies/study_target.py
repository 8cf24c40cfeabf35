"""What to predict: raw pixels against pixels normalised in each patch, for equal steps.

    python scripts/studies/study_target.py --dataset DATA

At full size:
    torchrun --nproc_per_node 8 -m hf_mae.cli pretrain --recipe vit_large_in1k --norm_pix_loss false \\
        --output_dir outputs/raw
    torchrun --nproc_per_node 8 -m hf_mae.cli finetune --recipe finetune_vit_large_in1k --model outputs/raw
"""

import study_common as studies

NOTES = """
In the paper (Table 1d, ViT-L on ImageNet-1K), fine-tuned / linear: raw pixels 84.9 / 73.5, normalised 85.4 /
73.9 %. The two evaluation losses have different targets and can't be compared.
"""


def main() -> None:
    options = studies.parser(str(__doc__), "outputs/study_target").parse_args()
    cells = [
        studies.Cell("raw", "raw pixels", ["--norm_pix_loss", "false"]),
        studies.Cell("normalised", "normalised pixels", ["--norm_pix_loss", "true"]),
    ]
    studies.main(cells, options, "target", NOTES)


if __name__ == "__main__":
    main()
