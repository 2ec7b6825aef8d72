"""Check that a run of `run_clm.py` learned more than word pairs, and let its model write.

    python trainer_scripts/quickstart.py OUTPUT_DIR

Loads the saved model in this new process, compares its validation perplexity with that of a Kneser-Ney bigram on the
very same blocks, and prints two continuations. Exits with code 1 if the model does not beat the bigram.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
import transformers
from arguments import UserError, exits_on_user_error, parse
from bigram import bigram_perplexity
from checkpoints import write_json
from model_card import load_record, write_card
from run_clm import ARGUMENTS
from text_data import load_blocks, load_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


PROMPTS = ("Return the number of", "This module provides")


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise UserError("usage: quickstart.py OUTPUT_DIR, the output_dir of a run of run_clm.py")
    folder = Path(argv[0])
    for name in ("recipe.yaml", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: train a model there with run_clm.py first")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if "eval_perplexity" not in metrics:
        raise UserError(f"{folder}/metrics.json has no eval_perplexity: train with do_eval")

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    _, data_args, *_ = parse(ARGUMENTS, [str(folder / "recipe.yaml")])
    splits = ["train", "validation"]
    blocks = load_blocks(load_texts(data_args), splits, tokenizer, metrics["block_size"], data_args)
    train, validation = (blocks[split].with_format("numpy")[:]["input_ids"] for split in splits)
    bigram = bigram_perplexity(train, validation, len(tokenizer))
    perplexity = metrics["eval_perplexity"]
    print(f"Validation perplexity over {metrics['eval_tokens']} tokens of {len(tokenizer)}:")
    print(f"  {type(model).__name__:<24}{perplexity:>10.2f}   ({metrics['parameters'] / 1e6:.2f}M parameters)")
    print(f"  {'Kneser-Ney bigram':<24}{bigram:>10.2f}")
    write_json(folder / "baseline.json", {"name": "Kneser-Ney bigram", "eval_perplexity": bigram})
    write_card(folder, load_record(folder), repo_id=folder.as_posix())

    set_seed(0)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_p=0.9, temperature=0.8)
        print(f"\n--- {prompt!r} goes on:\n{tokenizer.decode(output[0], skip_special_tokens=True)}")

    if perplexity >= bigram:
        print(f"\nThe model does not beat the bigram: {perplexity:.2f} >= {bigram:.2f}. Train it for longer.")
        sys.exit(1)


if __name__ == "__main__":
    main()
