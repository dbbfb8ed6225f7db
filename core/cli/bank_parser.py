"""The arguments of `bank`."""

from __future__ import annotations

from ..bank.concepts import KINDS
from ..bank.tokens import typed_name
from ..conditioning.routing import MODES
from ..interop.export import DEFAULT_FORMATS, FORMATS
from ..interop.factors import DEFAULT_ERROR, DEFAULT_RANK
from ..settings import FINITE, at_least
from .arguments import KIND_HELP, add_base, file_path, number, whole

BANK_HELP, NAME_HELP = "bank file", "name of a concept in the bank"


def add_bank(commands) -> None:
    bank = commands.add_parser("bank",
                               help="list, show, remove, rename, merge, verify, export, import, share, "
                               "restore")
    bank = bank.add_subparsers(dest="action", required=True)
    for action, help_text in (("list", "one line per concept"), ("verify", "read and check every concept")):
        bank.add_parser(action, help=help_text).add_argument("bank", type=file_path, help=BANK_HELP)
    show = bank.add_parser("show", help="all facts about a concept, or about every concept")
    show.add_argument("bank", type=file_path, help=BANK_HELP)
    show.add_argument("name", type=typed_name, nargs="?", help=f"{NAME_HELP} (default: every concept)")
    remove = bank.add_parser("remove", help="remove a concept")
    remove.add_argument("bank", type=file_path, help=BANK_HELP)
    remove.add_argument("name", type=typed_name, help=NAME_HELP)
    rename = bank.add_parser("rename", help="rename a concept")
    rename.add_argument("bank", type=file_path, help=BANK_HELP)
    rename.add_argument("name", type=typed_name, help=NAME_HELP)
    rename.add_argument("new", type=typed_name, help="its new name")
    restore = bank.add_parser("restore",
                              help="bring back an earlier version of a bank; without --version: list them")
    restore.add_argument("bank", type=file_path, help=BANK_HELP)
    restore.add_argument("--version", dest="number", type=whole(at_least(1)),
                         help="1 is the latest earlier version (default: list them)")
    share = bank.add_parser("share", help="write one concept to a bank file of its own, for other people")
    share.add_argument("bank", type=file_path, help=BANK_HELP)
    share.add_argument("name", type=typed_name, help=NAME_HELP)
    share.add_argument("--output", type=file_path, required=True,
                       help="new .safetensors file; model browsers show its thumbnail and texts")
    share.add_argument("--licence", default="",
                       help="what others may do with it, one line, such as 'CC BY 4.0' (default: none is "
                       "named)")
    share.add_argument("--author", default="", help="who made it, one line (default: none is named)")
    merge = bank.add_parser("merge", help="merge two banks into one file")
    merge.add_argument("bank", type=file_path, help=BANK_HELP)
    merge.add_argument("other", type=file_path, help="bank file whose concepts come last")
    merge.add_argument("--output", type=file_path, required=True, help="bank file to write")
    _add_export(bank)
    _add_import(bank)


def _add_import(bank) -> None:
    parser = bank.add_parser("import", help="add a LoRA or an embedding of another program as a concept")
    parser.add_argument("bank", type=file_path, help="bank file to add it to (created if missing)")
    parser.add_argument("name", type=typed_name, help="name of the concept: <name> in prompts")
    parser.add_argument("--noun", default="",
                        help="class noun: an ordinary word for the concept, e.g. dog (default: none)")
    parser.add_argument("--kind", choices=KINDS, default="object", help=KIND_HELP)
    parser.add_argument("--lora", type=file_path,
                        help=".safetensors file (LoRA, DoRA, LoHa, LoKr, .diff or Custom Diffusion; kohya's, "
                        "LyCORIS', diffusers' or PEFT's names), or the folder that PEFT or diffusers saved "
                        "(default: none)")
    parser.add_argument("--embedding", type=file_path,
                        help=".safetensors, a textual inversion (default: none)")
    parser.add_argument("--trigger", default="",
                        help="trigger words of a LoRA without learned words, e.g. 'sks dog' (default: none)")
    parser.add_argument("--which", default="",
                        help="the adapter or embedding to take from a file that holds several; one of each "
                        "with a comma (default: the only one)")
    add_base(parser)


def _add_export(bank) -> None:
    export = bank.add_parser("export",
                             help="write files for other programs: of one concept, of all, or for a prompt")
    export.add_argument("bank", type=file_path, help=BANK_HELP)
    export.add_argument("name", type=typed_name, nargs="?", help=NAME_HELP)
    export.add_argument("--all", action="store_true",
                        help="every concept; failures are reported and skipped (default: off)")
    export.add_argument("--prompt",
                        help="one LoRA with everything the bank adds for this prompt, and the words of the "
                        "concepts it names (default: none)")
    export.add_argument("--mode", choices=MODES, default="sharp",
                        help="with --prompt: how concepts are weighted (default %(default)s)")
    export.add_argument("--output", type=file_path, required=True,
                        help="folder for the files; existing files are kept")
    export.add_argument("--format", dest="formats", choices=FORMATS, action="append",
                        help="can be given several times; kohya: LoRA, bundle: LoRA and words in one file, "
                        f"diffusers: LoRA, embedding: words (default: {' and '.join(DEFAULT_FORMATS)})")
    export.add_argument("--strength", type=number(FINITE), default=1.0,
                        help="factor on the LoRA (default %(default)s)")
    export.add_argument("--rank", type=whole(at_least(1)),
                        help=f"of a LoRA made from sparse deltas (default {DEFAULT_RANK}); "
                        "with --prompt: of the LoRA (default: its exact rank)")
    export.add_argument("--max-error", type=number(at_least(0)), default=DEFAULT_ERROR,
                        help="largest relative error that this rank may cause (default %(default)s)")
    export.add_argument("--refit", action="store_true",
                        help="for layer-wise words: fit one vector to the text encoder instead of taking the "
                        "mean of the layer copies; pictures improve little (default: off)")
    export.add_argument("--compare", action="store_true",
                        help="with NAME: draw the concept with the bank and from the files, side by side, "
                        "into a PNG beside them (default: off)")
    add_base(export)
