"""Tables and pictures of runs, from the files that they leave behind: Markdown, PNG and one page of HTML.

    python trainer_scripts/report.py model_cards/wikitext2_* --baseline wikitext2_gpt2_6l --output docs/wikitext2
    python trainer_scripts/report.py model_cards/snli_* --output docs/snli \\
        --published_accuracies configuration/published_snli.json \\
        --compare snli_distilbert_grassmann:snli_distilbert_transformer

writes `docs/wikitext2.md`, `docs/wikitext2.png` and `docs/wikitext2.html`, which holds its pictures and so can be sent
around. Each folder of a run holds `recipe.yaml`, `log.jsonl`, `metrics.json` and, of classifiers, for comparisons and
intervals `outcomes_test.json`. Runs of `run_clm.py` and of `run_nli.py` may come together: the picture of the
classifiers then ends in `_accuracy.png`.

Cells of `run_matrix.py` of several depths or block sizes come each with a table of its own, if `--baseline` names a
model without them, as in `report.py runs/published/wikitext2_* --baseline wikitext2_transformer`.

Runs whose names differ only in a trailing `_seed<N>` are one model or group: tables hold their mean and standard
deviation, and curves are means. Every figure is read from the files; one that is not there shows as a dash, and
a language model that was not evaluated during its training is in the table alone. `--compare A:B` gives the difference
A - B of the mean accuracies, with a paired interval over the items of the split.
"""

from pathlib import Path

import report_clm
import report_nli
from arguments import UserError, exits_on_user_error
from run_records import (
    PREFIXES,
    ReportParser,
    Run,
    check_names,
    load_run,
    output_paths,
    write_document,
    write_page,
)


def is_classifier(run: Run) -> bool:
    """Whether a run is one of `run_nli.py`."""
    return any("accuracy" in key for key in run.metrics)


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = ReportParser(__doc__)
    parser.add_argument("--baseline", help="Name of the language model that the others are compared with.")
    parser.add_argument("--published_perplexities", type=Path, help="JSON file of published perplexities.")
    parser.add_argument("--step_times", type=Path, help="JSON file of `time_steps.py`, whose recipes name the models.")
    parser.add_argument("--compare", nargs="+", default=[], metavar="A:B", help="Groups of classifiers, A minus B.")
    parser.add_argument("--published_accuracies", type=Path, help="JSON file of published accuracies.")
    parser.add_argument(
        "--split", choices=PREFIXES, default="test", help="What comparisons, classes and their picture show."
    )
    args = parser.parse_args(argv)

    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    classifiers = [run for run in runs if is_classifier(run)]
    models = [run for run in runs if not is_classifier(run)]
    if classifiers and not models and args.baseline:
        raise UserError("--baseline is for language models, and there are none among the runs; try --compare")
    if models and not classifiers and args.compare:
        raise UserError("--compare is for classifiers, and there are none among the runs; try --baseline")
    document, picture = output_paths(args.output)
    parent, sections = document.parent, [f"# Results: {args.output.name}"]
    if models:
        sections += ["## Language models"] * bool(classifiers)
        sections += report_clm.sections(
            models, args.baseline, args.published_perplexities, args.step_times, parent, picture
        )
        picture = picture.with_name(f"{args.output.name}_accuracy.png")
    if classifiers:
        sections += ["## Classifiers"] * bool(models)
        sections += report_nli.sections(
            classifiers, args.compare, args.published_accuracies, args.split, parent, picture
        )
    sections.append("Written by `trainer_scripts/report.py`.")
    write_document(document, sections)
    page = write_page(document)
    print(f"wrote {document}, {page}, and the pictures that they show")


if __name__ == "__main__":
    main()
