"""How much to hide: the same model pretrained with several mask ratios, for equal time or equal steps, then measured.

    python scripts/studies/study_mask_ratio.py --dataset DATA --minutes 6

At full size, for each ratio:
    torchrun --nproc_per_node 8 -m hf_mae.cli pretrain --recipe vit_large_in1k --mask_ratio 0.5 --output_dir outputs/r50
    torchrun --nproc_per_node 8 -m hf_mae.cli finetune --recipe finetune_vit_large_in1k --model outputs/r50
"""

import study_common as studies

NOTES = """
The paper (Figure 5, ViT-L on ImageNet-1K) finds fine-tuning flat from 40 to 80 %, and the linear probe best at
75 %. A tutorial of unknown source prints 80.1 / 82.4 / 83.6 / 82.5 % for 25 / 50 / 75 / 90 %.
"""


def main() -> None:
    parser = studies.parser(str(__doc__), "outputs/study_mask_ratio")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9])
    options = parser.parse_args()
    cells = [studies.Cell(f"ratio-{ratio}", f"{ratio:.0%}", ["--mask_ratio", str(ratio)]) for ratio in options.ratios]
    studies.main(cells, options, "mask ratio", NOTES)


if __name__ == "__main__":
    main()
