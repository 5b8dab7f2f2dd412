"""onnxruntime-genai on the model that its own builder made."""

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
from worker import Generate, serve


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    folder = Path(settings["model"])
    config_path = folder / "genai_config.json"
    config = json.loads(config_path.read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    if options.get("intra_op_num_threads") != settings["threads"]:
        options["intra_op_num_threads"] = settings["threads"]
        config_path.write_text(json.dumps(config, indent=2))
    model = genai.Model(str(folder))

    def generate(prompt: list[int], new_tokens: int):
        parameters = genai.GeneratorParams(model)
        # One length for both: the ends of a reply are random numbers' to find here, so none may come early.
        length = len(prompt) + new_tokens
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return f"onnxruntime-genai {genai.__version__}", generate


serve(load)
