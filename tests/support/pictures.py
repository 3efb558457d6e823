"""Makes the pictures of the documentation: a session in a terminal, and five screenshots of reports on the models that it made.

python -P tests/support/pictures.py docs/images        (make pictures; needs Chromium, and pyte of the extra docs)

The session asks for a faster model of the demo, converts, measures and reports it. Beside it come a model healed by distillation, a
statically pruned one and copies, which the report puts side by side.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from journeys import rows
from report_browser import Browser
from terminal import Printed, in_terminal
from terminal_svg import Film

ROWS, COLUMNS = 30, 100
TEXT = "docs.jsonl"
SESSION: Mapping[str, Sequence[str]] = {
    "upcycle init": ("demo", "speed", TEXT, "y", "transformers"),
    "upcycle convert upcycle.yaml half": (),
    "upcycle evaluate half --reference demo": (),
    "upcycle report half": (),
}
HEALING = (
    f"upcycle train heal_distill --model half --output run --set data={TEXT} --set stages.0.tokens=65536 --set length=256 "
    "--set stages.0.schedule.warmup=4 --set global_batch=4 --set micro_batch=4"
)
MODELS = (
    HEALING,
    "upcycle export run healed",
    "upcycle convert demo pruned --method static_prune --active 0.5 --calibration demo",
    "upcycle convert demo copies --experts 4 --top-k 2",
)
MEASURED = ("half", "healed", "pruned", "copies")
# Name of the picture: its page, the window's width and height in CSS pixels, the colour scheme.
SHOTS = {
    "report_desktop_light.png": ("half", 1280, 860, "light"),
    "report_desktop_dark.png": ("half", 1280, 860, "dark"),
    "report_phone_light.png": ("half", 360, 780, "light"),
    "report_phone_dark.png": ("half", 360, 780, "dark"),
    "models_desktop_light.png": ("models", 1280, 860, "light"),
}
LARGEST = 160_000  # bytes: tests/packaging/test_documents.py asks for it


def run(command: str, folder: Path) -> None:
    """Run ``upcycle ...``; what it says goes to stderr."""
    words = [sys.executable, "-P", "-m", "upcycle", *command.split()[1:]]
    print(f"$ {command}", file=sys.stderr, flush=True)
    subprocess.run(words, cwd=folder, check=True, stdout=sys.stderr, env=os.environ | {"COLUMNS": str(COLUMNS)})


def held(folder: Path) -> dict[str, Printed]:
    """Hold the session, or read what was printed when it was held here before."""
    kept = folder / "session.json"
    if not kept.exists():
        found = {}
        for command, answers in SESSION.items():
            print(f"$ {command}", file=sys.stderr, flush=True)
            printed = in_terminal(command, folder, None, answers, (ROWS, COLUMNS))
            assert printed.status == 0, printed.text
            found[command] = [(at, block.decode("latin-1")) for at, block in printed.blocks]
        kept.write_text(json.dumps(found), encoding="utf-8")
    session = json.loads(kept.read_text(encoding="utf-8"))
    return {
        command: Printed([(at, block.encode("latin-1")) for at, block in blocks], 0)
        for command, blocks in session.items()
    }


def terminal(session: Mapping[str, Printed]) -> str:
    """The session as SVG."""
    film = Film(ROWS, COLUMNS)
    for command, printed in session.items():
        film.typed(command)
        film.printed(printed.blocks)
    return film.svg(
        "A terminal: upcycle init, convert, evaluate and report, until a faster model of the demo is measured"
    )


def shots(folder: Path, out: Path) -> None:
    """Take the screenshots, two device pixels per CSS pixel, in few colours."""
    from PIL import Image

    with Browser() as browser:
        for name, (model, width, height, scheme) in SHOTS.items():
            page = folder / model / "report.html" if model != "models" else folder / "models.html"
            found = browser.open(page.as_uri(), width, height, scheme, picture=True, scale=2)
            picture = Image.open(io.BytesIO(found.picture)).convert("RGB")
            picture.quantize(64, dither=Image.Dither.NONE).save(out / name, "PNG", optimize=True)


def main() -> None:
    """Make the models, and of them the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--work", type=Path, help="keep what was printed and the models here; what is there is not made again"
    )
    options = parser.parse_args()
    from upcycle.text.reading.plain_text import read_text

    with tempfile.TemporaryDirectory(prefix="pictures-") as place:
        folder = (options.work or Path(place)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows(folder / TEXT, read_text("prose")[:150_000] + read_text("code")[:150_000])
        (options.out / "terminal.svg").write_text(terminal(held(folder)), encoding="utf-8")
        if not (folder / "models.html").exists():
            for command in MODELS:
                run(command, folder)
            for name in MEASURED:
                run(f"upcycle evaluate {name} --reference demo --speed", folder)
            run(f"upcycle report {' '.join(['demo', *MEASURED])} --out models.html", folder)
        shots(folder, options.out)
    for name in ("terminal.svg", *SHOTS):
        size = (options.out / name).stat().st_size
        print(f"{options.out / name}: {size / 1000:.0f} KB")
        assert size < LARGEST, f"{name} is too large for a page"


if __name__ == "__main__":
    main()
