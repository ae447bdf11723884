"""TransKD: does a small SegFormer that imitates a large one's maps and patch embeddings segment better?

A teacher is trained on street scenes, then students of half its widths and depth are trained from scratch, equally
long: by the weighted cross-entropy alone ("none"), by TransKD ("base", "gl", "ea"), and by what it is compared with
("logits": Hinton, "review": ReviewKD, "cwd": channel-wise distillation of the deepest stage). Mean IoU on images of
other drives, void pixels left out.

    python -m experiments.transkd                  # small: minutes on two CPU cores, three seeds
    python -m experiments.transkd paper --data cityscapes/    # leftImg8bit/ and gtFine/ as they come; B2 to B0

Data: `--data` Cityscapes' directory, or one with train.npz, val.npz and test.npz (images (n, H, W, 3), labels
(n, H, W)). Default: camvid_small beside the repository (CC BY-NC), else scenes of handwritten digits from scikit-learn.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxformers as jf
from experiments import common
from jaxformers.compress.transkd import VARIANTS, TransKDConfig, new_distiller, transkd_objective
from jaxformers.compress.transkd_distil import PAPER, evaluate, new_student, segmentation_distil
from jaxformers.data.resample import resize
from jaxformers.data.segmentation import Segmentation, read_folders
from jaxformers.extras import require
from jaxformers.models import segformer
from jaxformers.train import TrainConfig

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """`teacher_widths` … `student_depth`: of the four stages. `teacher`: a checkpoint to begin the teacher's training
    from (its widths are then its own), or with `teacher_steps` 0 the teacher itself; it must take images in [0, 1].
    `rate`, `batch`, `steps`: of the students. `size`: images are resized to (height, width)."""

    data: Path | None = None
    methods: tuple[str, ...] = ("none", "base", "gl", "ea")
    teacher: str | None = None
    teacher_widths: tuple[int, ...] = (32, 64, 80, 128)
    teacher_depth: tuple[int, ...] = (2, 2, 2, 2)
    teacher_head: int = 64
    teacher_steps: int = 300
    teacher_rate: float = 1e-3
    widths: tuple[int, ...] = (16, 32, 40, 64)
    depth: tuple[int, ...] = (1, 1, 1, 1)
    head: int = 64
    heads: tuple[int, ...] = (1, 2, 5, 8)
    steps: int = 100
    rate: float = 1e-3
    batch: int = 8
    fusion: int = 32
    cwd_weight: float = 3.0
    cwd_temperature: float = 4.0
    logits_temperature: float = 2.0
    final: float = 0.0
    size: tuple[int, int] = (48, 64)
    scenes: int = 96
    limit: int | None = None
    seeds: int = 3

    def __post_init__(self):
        if not self.methods or set(self.methods) - set(VARIANTS):
            raise ValueError(f"methods: expected some of {', '.join(VARIANTS)}, got {self.methods}")


PRESETS = {
    "smoke": Config(  # the teacher has the student's sizes: one program less to compile
        methods=("none", "ea"), teacher_widths=(8, 8, 8, 8), teacher_depth=(1, 1, 1, 1), teacher_head=8,
        teacher_steps=3, widths=(8, 8, 8, 8), head=8, heads=(1, 1, 1, 1), steps=3, fusion=8, scenes=32, seeds=1,
    ),
    "small": Config(),
    "paper": Config(
        methods=("none", "base", "gl", "ea"), teacher="nvidia/mit-b2", teacher_widths=(64, 128, 320, 512),
        teacher_depth=(3, 4, 6, 3), teacher_head=768, teacher_steps=372_000, teacher_rate=6e-5,
        widths=(32, 64, 160, 256), depth=(2, 2, 2, 2), head=256, steps=PAPER.steps, rate=6e-5, final=1 / 3, batch=2,
        fusion=64, size=(512, 1024), seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    train, val, test, names = data(config)
    teacher = trained_teacher(config, train, val, out)
    of_teacher = evaluate(teacher, test)
    rows = []
    for seed in range(config.seeds):
        for method in config.methods:
            done = segmentation_distil(
                teacher if method != "none" else None, sizes(config, train.classes), train,
                out / "student" if (method, seed) == (config.methods[-1], 0) else None, key=jax.random.key(seed),
                config=loss(config, method), train=schedule(config.steps, config.rate, config.final),
                batch_size=config.batch, heldout=val, directory=out / f"{method}-{seed}",
            )  # fmt: skip
            report = evaluate(done.student, test)
            common.record(out, rows, {
                "method": method, "seed": seed, "mIoU": 100 * report["miou"], "accuracy": 100 * report["accuracy"],
                "val mIoU": 100 * done.report["miou"], "IoU": common.plain(100 * report["iou"]),
            })  # fmt: skip
    count = lambda model: sum(x.size for x in jax.tree.leaves(jf.functional(model)[1]))
    summary = [{"trained by": "(teacher)", "parameters": count(teacher), "mIoU": f"{100 * of_teacher['miou']:.4g}",
                "pixel accuracy": f"{100 * of_teacher['accuracy']:.4g}"}]  # fmt: skip
    for method in config.methods:
        mine = [r for r in rows if r["method"] == method]
        plain = {r["seed"]: r["mIoU"] for r in rows if r["method"] == "none"}
        summary.append({
            "trained by": method, "parameters": count(done.student), "mIoU": common.mean_std(r["mIoU"] for r in mine),
            "above none": common.mean_std(r["mIoU"] - plain[r["seed"]] for r in mine if plain and method != "none"),
            "pixel accuracy": common.mean_std(r["accuracy"] for r in mine),
        })  # fmt: skip
    common.table(f"TransKD: test images, {config.seeds} seeds, {config.steps} steps of {config.batch}", summary)
    classes = [
        {"class": name, **{m: common.mean_std(r["IoU"][i] for r in rows if r["method"] == m) for m in config.methods}}
        for i, name in enumerate(names)
    ]
    common.table("IoU by class", classes)
    common.figure(out / "figure.png", lambda fig: draw(fig, rows, of_teacher["miou"]))
    return {"rows": rows, "classes": names, "teacher": {k: of_teacher[k] for k in ("miou", "accuracy", "iou")}}


def data(config: Config) -> tuple[Segmentation, Segmentation, Segmentation, tuple[str, ...]]:
    """(train, val, test, names of the classes). Cityscapes' labels of its test set are not public: val is both."""
    root = common.shared_data("camvid_small", config.data)
    if root is None:
        counts = (config.scenes, config.scenes // 4, config.scenes // 4)
        parts = [scenes(n, seed, config.size) for seed, n in enumerate(counts)]
        return *parts, (*map(str, range(10)), "paper")
    if (root / "leftImg8bit").is_dir():
        options = {"classes": 20, "void": 19, "size": config.size, "image_ending": "_leftImg8bit",
                   "mask_ending": "_gtFine_labelTrainIds"}  # fmt: skip
        train, val = (read_folders(root / "leftImg8bit" / p, root / "gtFine" / p, **options) for p in ("train", "val"))
        return train, val, val, CITYSCAPES
    parts = []
    for part in ("train", "val", "test"):
        if not (root / f"{part}.npz").is_file():
            raise ValueError(f"data: {root} has neither leftImg8bit/ nor {part}.npz")
        arrays = np.load(root / f"{part}.npz")
        resized = [np.stack([resize(x, config.size, kind) for x in arrays[name][: config.limit]])
                   for name, kind in (("images", "bilinear"), ("labels", "nearest"))]  # fmt: skip
        parts.append(Segmentation(*resized, 12, 11))
    return *parts, CAMVID


def scenes(n: int, seed: int, size: tuple[int, int]) -> Segmentation:
    """Handwritten digits of scikit-learn, three times as large, in colours on shaded paper; a pixel of ink has its
    digit's class, all others class 10. Seeds, modulo 3, draw from different digits."""
    digits = require("sklearn.datasets", extra="link").load_digits()
    own = np.flatnonzero(np.arange(len(digits.target)) % 3 == seed % 3)
    rng = np.random.default_rng(seed)
    images, labels = np.empty((n, *size, 3), np.uint8), np.full((n, *size), 10, np.uint8)
    for image, mask in zip(images, labels, strict=True):
        shade = np.linspace(*rng.uniform(90, 250, 2), size[1])[None, :, None] * rng.uniform(0.8, 1, 3)
        canvas = np.broadcast_to(shade, (*size, 3)) + rng.normal(0, 12, (*size, 3))
        for i in rng.choice(own, size[0] * size[1] // 1024):
            ink = np.kron(digits.images[i], np.ones((3, 3))) / 16
            y, x = rng.integers(0, size[0] - 23), rng.integers(0, size[1] - 23)
            window = canvas[y : y + 24, x : x + 24]
            canvas[y : y + 24, x : x + 24] = window * (1 - ink[..., None]) + rng.uniform(0, 120, 3) * ink[..., None]
            mask[y : y + 24, x : x + 24][ink > 0.5] = digits.target[i]
        image[:] = np.clip(canvas, 0, 255)
    return Segmentation(images, labels, 11, 255)


def sizes(config: Config, classes: int, *, teacher: bool = False) -> segformer.Config:
    widths, depth, head = (config.widths, config.depth, config.head)
    if teacher:
        widths, depth, head = (config.teacher_widths, config.teacher_depth, config.teacher_head)
    return segformer.Config(
        hidden_sizes=widths, depths=depth, num_heads=config.heads, decoder_hidden_size=head, num_labels=classes
    )


def loss(config: Config, method: str) -> TransKDConfig:
    changes: dict[str, Any] = {"width": config.fusion} if method in ("base", "gl", "ea", "review") else {}
    if method == "gl":
        changes |= {"mixer_heads": config.heads[-1]}
    elif method == "logits":
        changes |= {"temperature": config.logits_temperature}
    elif method == "cwd":
        changes |= {"temperature": config.cwd_temperature, "map_weight": config.cwd_weight}
    return TransKDConfig(method, **changes)


def schedule(steps: int, rate: float, final: float) -> TrainConfig:
    optim = dataclasses.replace(PAPER.optim, learning_rate=rate, final=final)
    return TrainConfig(steps=steps, optim=optim, log_every=max(steps // 20, 1), progress=False)


def trained_teacher(config: Config, train: Segmentation, val: Segmentation, out: Path) -> Any:
    """The teacher, trained by the weighted cross-entropy alone."""
    start = sizes(config, train.classes, teacher=True)
    if config.teacher is not None:
        if not config.teacher_steps:
            return jf.load(config.teacher)
        start = jf.load(config.teacher, head="semantic_segmentation", key=jax.random.key(98), num_labels=train.classes,
                        decoder_hidden_size=config.teacher_head)  # fmt: skip
    done = segmentation_distil(
        None, start, train, out / "teacher", key=jax.random.key(99), config=TransKDConfig("none"),
        train=schedule(config.teacher_steps, config.teacher_rate, config.final), batch_size=max(config.batch, 8),
        heldout=val, directory=out / "teacher-run",
    )  # fmt: skip
    return done.student


def draw(fig: Any, rows: list[dict], teacher: float) -> None:
    axes = fig.subplots()
    names = list(dict.fromkeys(r["method"] for r in rows))
    for i, name in enumerate(names):
        values = [r["mIoU"] for r in rows if r["method"] == name]
        axes.bar(i, np.mean(values), color="0.7" if name == "none" else f"C{i}")
        axes.plot([i] * len(values), values, "k.", markersize=4)
    axes.axhline(100 * teacher, color="k", linestyle="--", linewidth=1, label="teacher")
    axes.set(ylabel="mean IoU on test images, %")
    axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: the step of the last method, one image a device or `batch`."""
    from jaxformers.dryrun_steps import Array, train_step

    batch = max(config.batch, mesh.size)
    kept: list[Any] = []

    def build() -> Any:
        teacher, student = (
            new_student(sizes(config, 20, teacher=own), key=jax.random.key(own)) for own in (True, False)
        )
        method = loss(config, config.methods[-1])
        plain = method.variant in ("none", "logits")
        distiller = None if plain else new_distiller(teacher, student, method, key=jax.random.key(2))
        objective, params, freeze = transkd_objective(teacher, student, distiller, method, void=19)
        kept.extend((objective, freeze))
        return params

    params = jax.eval_shape(build)
    train = dataclasses.replace(schedule(config.steps, config.rate, config.final), freeze=kept[1])
    shapes = {"pixel_values": Array((batch, 3, *config.size), jnp.float32),
              "labels": Array((batch, *config.size), jnp.int32)}  # fmt: skip
    name = f"transkd, {config.methods[-1]}, {batch} images of {config.size[0]} × {config.size[1]}"
    return train_step(name, kept[0], None, params, shapes, train, mesh)


if __name__ == "__main__":
    common.main("transkd", PRESETS, run, step=step)
