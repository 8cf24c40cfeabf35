"""How deep the decoder should be: the same encoder pretrained with decoders of several depths for equal steps.

    python scripts/studies/study_decoder.py --dataset DATA

At full size, for each depth:
    torchrun --nproc_per_node 8 -m hf_mae.cli pretrain --recipe vit_large_in1k --decoder_num_hidden_layers 1 \\
        --output_dir outputs/depth1
    torchrun --nproc_per_node 8 -m hf_mae.cli finetune --recipe finetune_vit_large_in1k --model outputs/depth1
"""

import study_common as studies

NOTES = """
In the paper (Table 1a, ViT-L on ImageNet-1K), fine-tuned / linear: 1 block 84.8 / 65.5, 2 84.9 / 70.0, 4 84.9 / 71.9,
8 84.9 / 73.5, 12 84.4 / 73.3 %.
"""


def main() -> None:
    parser = studies.parser(str(__doc__), "outputs/study_decoder")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    cells = [
        studies.Cell(f"depth-{depth}", str(depth), ["--decoder_num_hidden_layers", str(depth)])
        for depth in options.depths
    ]
    studies.main(cells, options, "decoder blocks", NOTES)


if __name__ == "__main__":
    main()
