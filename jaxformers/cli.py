"""The ``jaxformers`` command: one verb a function, thin around the library. Errors are one line and exit code 2."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxformers.arguments import parsed
from jaxformers.cli_train import Model, dry_run, train
from jaxformers.compilation import enable_cache


def quickstart(out: Path = Path("runs/quickstart"), seed: int = 0) -> None:
    """Pre-train, compress and apply a small language model on text that every Python ships, in about three minutes.

    Trains a BPE tokenizer and a llama on English and Python sources, quantises it by RTN and GPTQ at 8, 4, 3 and 2
    bits, saves and reloads the 4-bit checkpoint, generates from it, and links two tables with a sentence encoder where
    one is found. Ends with one table and one figure.

    Args:
        out: directory that receives the checkpoint, metrics, table and figure.
        seed: of the model's initial weights, the batches and the calibration sample.
    """
    from jaxformers.quickstart import run

    run(out, seed=seed)


def info(model: Model, mesh: str | None = None, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> None:
    """Describe a checkpoint without reading its weights: architecture, head, parameters by path, bytes, memory.

    Args:
        model: directory in the Hugging Face layout, hub id, or all-MiniLM-L6-v2 where its package is installed.
        mesh: such as fsdp=8,tensor=2: also tell the memory of one of its devices. They need not be there.
        dtype: of the weights in memory; default: as stored.
    """
    from jaxformers import describe

    print(describe.info(model, mesh=mesh, dtype=dtype))


def embed(
    model: Model,
    texts: Annotated[list[str], tyro.conf.Positional],
    file: Path | None = None,
    field: str = "text",
    out: Path | None = None,
    batch_size: int = 128,
) -> None:
    """Embed texts: one vector each, pooled and normalised as the checkpoint says.

    Args:
        model: directory in the Hugging Face layout, hub id, or all-MiniLM-L6-v2 where its package is installed.
        texts: texts to embed; or none, with --file.
        file: .txt (one text a line), .jsonl, .csv or .tsv.
        field: the column of --file that holds the text, for tables.
        out: .npy file for the float32 matrix (texts, width); without it, JSON lines are printed.
        batch_size: texts a batch.
    """
    import numpy as np

    import jaxformers as jf
    from jaxformers.data.text import read_texts

    if (file is None) == (not texts):
        raise ValueError("texts: give texts or --file, one of the two")
    if out is not None and out.suffix != ".npy":
        raise ValueError(f"out: expected a .npy file, got {out}")
    rows = texts or read_texts(file, field)
    vectors = jf.embed(jf.load(model), rows, batch_size=batch_size)
    if out is not None:
        np.save(out, vectors)
        print(f"{vectors.shape[0]} vectors of width {vectors.shape[1]} in {out}")
        return
    for text, vector in zip(rows, vectors, strict=True):
        print(json.dumps({"text": text, "embedding": [round(float(x), 6) for x in vector]}, ensure_ascii=False))


def link(
    left: Annotated[Path, tyro.conf.Positional],
    right: Annotated[Path, tyro.conf.Positional],
    on: tuple[str, ...] = (),
    left_on: tuple[str, ...] = (),
    right_on: tuple[str, ...] = (),
    model: str = "all-MiniLM-L6-v2",
    k: int = 1,
    min_score: float | None = None,
    out: Path | None = None,
) -> None:
    """Link the rows of two tables by meaning: each left row gets its nearest right rows and their cosine.

    Args:
        left: .csv file.
        right: .csv file.
        on: columns to compare, the same in both tables; default: all that they share.
        left_on: columns of the left table, where names differ.
        right_on: columns of the right table, where names differ.
        model: directory in the Hugging Face layout, hub id, or all-MiniLM-L6-v2 where its package is installed.
        k: neighbours for each left row.
        min_score: leave out pairs whose cosine is below.
        out: .csv file for the result; printed without it.
    """
    from jaxformers.extras import require
    from jaxformers.tasks import linktransformer

    pandas = require("pandas", "link")
    tables = []
    for path in (left, right):
        try:
            tables.append(pandas.read_csv(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as CSV ({error})") from None

    def columns(names: tuple[str, ...]) -> list[str] | str | None:
        return None if not names else names[0] if len(names) == 1 else list(names)

    linked = linktransformer.merge_knn(
        *tables,
        on=columns(on),
        left_on=columns(left_on),
        right_on=columns(right_on),
        model=model,
        k=k,
        drop_sim_threshold=min_score,
    )
    if out is not None:
        linked.to_csv(out, index=False)
        print(f"{len(linked)} pairs in {out}")
    else:
        print(linked.to_string(index=False))


def quantize(
    model: Model,
    out: Path,
    method: Literal["gptq", "rtn"] = "gptq",
    bits: Literal[2, 3, 4, 8] = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    true_sequential: bool = False,
    damp: float = 0.01,
    format: Literal["gptq", "gptq_v2"] = "gptq",
    calibration: Path | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> None:
    """Quantise the linear layers of a checkpoint to 2, 3, 4 or 8 bits, block by block, and save it packed.

    The result is what GPTQ readers (Hugging Face, AutoGPTQ, GPTQModel) and this library load. An interrupted run
    goes on where it stopped when the same command is given again.

    Args:
        model: directory in the Hugging Face layout, hub id, or all-MiniLM-L6-v2 where its package is installed.
        out: directory for the quantised checkpoint.
        method: gptq compensates each rounding error in the weights still to come; rtn rounds to nearest.
        bits: of each weight.
        group_size: input columns that share a scale; -1 for one scale a row.
        sym: a grid symmetric around zero.
        act_order: quantise columns in the order of decreasing activation.
        static_groups: fix all group scales before the first column is rounded.
        true_sequential: let each sub-layer see the rounding of those before it in its block.
        damp: share of the mean Hessian diagonal that is added to it.
        format: version of the packed layout.
        calibration: .txt, .jsonl (field text), or .npy of token ids (samples, length). Needed by gptq.
        samples: calibration sequences drawn from text.
        length: tokens of each; cut to what the model's positions allow.
        seed: of that draw.
    """
    from jaxformers.compress.gptq import quantize_checkpoint

    report = quantize_checkpoint(
        model, out, method=method, bits=bits, group_size=group_size, sym=sym, act_order=act_order,
        static_groups=static_groups, true_sequential=true_sequential, damp=damp, checkpoint_format=format,
        calibration=calibration, samples=samples, length=length, seed=seed,
    )  # fmt: skip
    print(report)
    print(f"saved in {out}")


def compress(
    model: Model,
    recipe: Path,
    out: Path,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    samples: int = 128,
    length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Compress a checkpoint by a recipe: a chain of methods, each on what the one before has made.

    OUT receives a checkpoint after each step, report.json and figure.png: size against quality. An interrupted run
    goes on after its last finished step when the same command is given again.

    Args:
        model: directory in the Hugging Face layout, hub id, or all-MiniLM-L6-v2 where its package is installed.
        recipe: TOML file with a table [[step]] for each step: method, and its options.
        out: directory for the checkpoints and the report.
        calibration: for methods that need data: .txt, .jsonl (field text), .npy of token ids (samples, length), .npz of
            inputs by name; for classifiers of sequences a .jsonl, .csv or .tsv table with text (text2) and label.
        evaluation: what quality is measured on after each step: perplexity of a language model on a text or .npy,
            accuracy of a classifier on an .npz with labels, or on a table.
        samples: calibration sequences drawn from text.
        length: tokens of each, and of the evaluation's windows; cut to what the model's positions allow.
        batch_size: windows a batch of the evaluation.
        seed: of the calibration draw and of what steps draw.
    """
    from jaxformers.recipes import run_recipe

    report = run_recipe(
        model, recipe, out, calibration=calibration, evaluation=evaluation, samples=samples, length=length,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    print(report)
    print(f"checkpoints, report.json and figure.png are in {out}")


def perplexity(model: Model, text: Path, length: int | None = None, batch_size: int = 8) -> None:
    """Perplexity of a causal language model on a text file: the mean over disjoint windows, the tail dropped.

    Args:
        model: directory in the Hugging Face layout or hub id.
        text: .txt (the whole file is tokenised once), .jsonl or .csv (field text), or .npy of token ids.
        length: tokens a window; default: what the model's positions allow, at most 2048.
        batch_size: windows a batch.
    """
    from jaxformers.evaluation import perplexity_of_file

    found = perplexity_of_file(model, text, length=length, batch_size=batch_size)
    print(json.dumps(found))


def generate(
    model: Model,
    prompts: Annotated[list[str], tyro.conf.Positional],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    early_stopping: Literal["yes", "no", "never"] | None = None,
    stop: tuple[str, ...] = (),
    stream: bool = False,
    seed: int = 0,
) -> None:
    """Continue prompts with a causal language model, or answer them with an encoder–decoder.

    Args:
        model: directory in the Hugging Face layout or hub id.
        prompts: one or more texts.
        max_new_tokens: tokens to add, at most.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that hold this much probability.
        min_p: sample among tokens at least so many times as likely as the likeliest.
        repetition_penalty: above 1 makes tokens that came before less likely.
        num_beams: above 1 searches for the likeliest text, with so many candidates.
        length_penalty: of beam search: above 0 favours longer texts.
        early_stopping: of beam search: yes ends with as many texts as beams, never only when none can get better.
        stop: texts at which to stop.
        stream: print the text as it comes; for one prompt.
        seed: of sampling.
    """
    import jax

    import jaxformers as jf
    from jaxformers.prompts import printing

    if not prompts:
        raise ValueError("prompts: give at least one")
    if stream and len(prompts) > 1:
        raise ValueError("stream: prints one text as it comes; give one prompt")
    loaded = jf.load(model)
    settings = {"temperature": temperature, "key": jax.random.key(seed)} if temperature != 0 else {}
    settings |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    settings |= {"num_beams": num_beams, "length_penalty": length_penalty, "stop_sequences": stop}
    settings |= {"early_stopping": {None: None, "yes": True, "no": False, "never": "never"}[early_stopping]}
    asked = [""] * len(prompts) if hasattr(loaded, "encode") else prompts
    shown, look = printing(loaded, asked[0], stop) if stream else ([], None)
    texts = jf.generate(loaded, prompts, max_new_tokens=max_new_tokens, stream=look, **settings)
    for prompt, text in zip(asked, texts, strict=True):
        whole = f"{prompt}{text}"
        print(whole[len("".join(shown)) :])


VERBS = (quickstart, info, embed, link, quantize, compress, perplexity, generate, train, dry_run)


def main(argv: list[str] | None = None) -> None:
    """Run one verb; exit code 2 and one line on bad input, 130 on Ctrl-C."""
    enable_cache()
    try:
        call = parsed(
            {verb.__name__.replace("_", "-"): verb for verb in VERBS},
            argv,
            prog="jaxformers",
            description="Pretrained transformers in JAX: pre-train, adapt, compress and apply them.",
        )
        call()
    except (ValueError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"jaxformers: error: {lines[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
