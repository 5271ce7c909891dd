"""A trained model on a task of the user's own: classes of pictures in, the classes of other pictures out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load
from .config import IMAGES, Config
from .files import write_atomically
from .learners import Learner
from .presets import build_learner, build_preparation
from .tasks.picture_files import ENDINGS, Files, Picture


class Prediction(NamedTuple):
    """What a picture was taken for, and the probability that the model gives it.

    >>> Prediction("scans/1.png", truth=None, label="ant", probability=0.75).label
    'ant'
    """

    picture: str
    truth: str | None
    """Its class, where the folder that it lies in tells."""
    label: str
    probability: float


@dataclass(frozen=True)
class Adapted:
    """A model adapted to named classes; made by :func:`adapt`.

    Images are (channels, side, side), floats in [0, 1]; :meth:`predict` prepares them from files, and raises
    FileNotFoundError and ValueError for those that are none.

    >>> from imaml import MAML
    >>> from imaml.config import Config, Tasks
    >>> from imaml.models import ConvNet
    >>> net = ConvNet(ways=2, channels=3, filters=8)
    >>> learner = MAML(net, torch.nn.functional.cross_entropy, steps=1, stepsize=0.1)
    >>> support = (torch.rand(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]))
    >>> model = Adapted(Config(Tasks.folder, side=16), learner, ["ant", "bee"], support, learner.adapt(support))
    >>> probabilities = model.probabilities(torch.rand(3, 16, 16))
    >>> probabilities.shape, round(float(probabilities.sum()), 4)
    (torch.Size([2]), 1.0)
    """

    config: Config
    learner: Learner
    classes: list[str]
    support: tuple[Tensor, Tensor]
    """Images and the indices of their classes."""
    parameters: dict[str, Tensor]

    def predict(self, query: Path) -> list[Prediction]:
        """The most probable class of each picture of a folder, of its folders (the names of their classes), or a zip
        of them; or of one picture. No answer hangs on what other pictures there are.

        Raises FileNotFoundError and ValueError where there are none, or a picture is of none of the classes.
        """
        pictures = _pictures(query)
        foreign = sorted({p.truth for p in pictures if p.truth is not None} - set(self.classes))
        if foreign:
            raise ValueError(f"{query} has pictures of {foreign[0]}, but adapted to were {', '.join(self.classes)}.")
        predictions = []
        for picture in pictures:
            probability, best = self.probabilities(_image(self.config, picture)).max(0)
            predictions.append(Prediction(picture.name, picture.truth, self.classes[int(best)], float(probability)))
        return predictions

    def probabilities(self, image: Tensor) -> Tensor:
        """Of the classes, for one prepared image (channels, side, side)."""
        # Batch norm sees a picture beside the support set. On its own it would be normalised to a blank, and pictures
        # of one class to what they differ in.
        beside = torch.cat([_balanced(self.support)[0], image[None]])
        with torch.no_grad():
            return self.learner.predict(self.parameters, beside)[-1].softmax(-1)

    def left_out(self) -> float | None:
        """The share of support pictures that are named rightly by the others; None where a class has but one.

        An estimate of the accuracy to expect, from the support set alone.
        """
        images, labels = self.support
        if int(labels.bincount().min()) < 2:
            return None
        hits = 0
        for i in range(len(labels)):
            others = torch.arange(len(labels)) != i
            without = _adapted(self.config, self.learner, self.classes, (images[others], labels[others]))
            hits += int(without.probabilities(images[i]).argmax() == labels[i])
        return hits / len(labels)


def adapt(run: Path, support: Path) -> Adapted:
    """The model of a run, adapted to the classes of pictures in a folder or zip: ``support/CLASS/picture.png``.

    The classes may be more or fewer than the model was trained with, and of unequal size. The pictures are prepared as
    those of the training data; that data need not be there.

    Raises CheckpointError, FileNotFoundError and ValueError where the run or the folder is of no use.

    ``imaml train`` leaves a run, of settings and what was learned. One that has learned nothing yet:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from imaml import checkpoint
    >>> from imaml.config import Config, Tasks
    >>> from imaml.presets import build_learner
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run, support = Path(folder, "run"), Path(folder, "support")
    ...     config = Config(Tasks.folder, side=16).completed()
    ...     run.mkdir()
    ...     config.write(run)
    ...     checkpoint.save(run, {"learner": build_learner(config).state_dict()})
    ...     for name in ("circles", "squares"):
    ...         (support / name).mkdir(parents=True)
    ...         Image.effect_noise((16, 16), 90).save(support / name / "1.png")
    ...     model = adapt(run, support)
    ...     predictions = model.predict(support)
    >>> model.classes, [prediction.truth for prediction in predictions]
    (['circles', 'squares'], ['circles', 'squares'])
    """
    config = Config.read(run)
    if config.tasks not in IMAGES:
        raise ValueError(
            f"{run} is a run on {config.tasks.value}, but adapting takes pictures. For data of another kind there are "
            f"learner.adapt and learner.predict, in Python."
        )
    state = load(run)["learner"]
    pictures = _pictures(support)
    classes = sorted({picture.truth for picture in pictures if picture.truth is not None})
    if len(classes) < 2:
        raise ValueError(
            f"{support} must hold a folder of pictures for each class, two at least: {support}/CLASS/*.png."
        )
    learner = _restored(run, replace(config, ways=len(classes)), state)
    images = torch.stack([_image(config, picture) for picture in pictures])
    labels = torch.tensor([classes.index(str(picture.truth)) for picture in pictures])
    return _adapted(config, learner, classes, (images, labels))


def confusion(predictions: Sequence[Prediction]) -> Counter[tuple[str, str]]:
    """How often pictures of a (first) class were taken for a (second) one; those of no known class do not count.

    >>> confusion([Prediction("1.png", "ant", "bee", 0.75), Prediction("2.png", "bee", "bee", 0.9)])
    Counter({('ant', 'bee'): 1, ('bee', 'bee'): 1})
    """
    return Counter((p.truth, p.label) for p in predictions if p.truth is not None)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as a CSV file: picture, class where known, prediction, probability.

    Raises OSError where the file cannot be written, FileNotFoundError where its folder is missing.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_predictions([Prediction("1.png", "ant", "bee", 0.75)], Path(folder, "predictions.csv"))
    ...     print(Path(folder, "predictions.csv").read_text())
    picture,class,prediction,probability
    1.png,ant,bee,0.7500
    <BLANKLINE>
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["picture", "class", "prediction", "probability"])
    for p in predictions:
        writer.writerow([p.picture, p.truth or "", p.label, f"{p.probability:.4f}"])
    write_atomically(path, text.getvalue().encode())


class _Picture(NamedTuple):
    name: str
    read: Callable[[], bytes]
    truth: str | None


def _pictures(place: Path) -> list[_Picture]:
    """The pictures of a folder or zip, or those of its folders with their names; or one picture."""
    if place.is_file() and place.suffix.lower() in ENDINGS:
        return [_Picture(str(place), place.read_bytes, None)]
    files = Files(place)
    named = files.pictures()
    here = [name for name in sorted(files.stamps) if "/" not in name and name.lower().endswith(ENDINGS)]
    if here and any(named.values()):
        raise ValueError(f"{place} holds pictures beside folders of pictures: it must be one or the other.")
    for name, pictures in named.items():
        if not here and not pictures:
            raise ValueError(f"the folder {name} of {place} holds no pictures ({', '.join(ENDINGS)}).")
    if not (here or named):
        raise ValueError(f"{place} holds no pictures, nor folders of them ({', '.join(ENDINGS)}).")
    flat = [_Picture(str(p), p.read, None) for p in (Picture(files, name) for name in here)]
    return flat or [_Picture(str(p), p.read, name) for name, pictures in named.items() for p in pictures]


def _image(config: Config, picture: _Picture) -> Tensor:
    pixels = build_preparation(config)(picture.read(), picture.name)
    return torch.from_numpy(pixels.copy()).float() / 255


def _adapted(config: Config, learner: Learner, classes: list[str], support: tuple[Tensor, Tensor]) -> Adapted:
    return Adapted(config, learner, classes, support, learner.adapt(_balanced(support)))


def _balanced(support: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pictures of smaller classes several times: in the mean loss a class would else count by its pictures."""
    images, labels = support
    members = [(labels == c).nonzero().flatten() for c in range(int(labels.max()) + 1)]
    most = max(len(m) for m in members)
    chosen = torch.cat([m.repeat(-(-most // len(m)))[:most] for m in members])
    return images[chosen], labels[chosen]


def _restored(run: Path, config: Config, state: dict[str, Tensor]) -> Learner:
    """The learner of a run for another number of ways. What is not learned is as it is built: a head of zeros."""
    learner = build_learner(config)
    learned = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    other = [name for name, p in learned.items() if name not in state or state[name].shape != p.shape]
    if other:
        raise CheckpointError(
            f"{run} was not trained on tasks of {config.ways} classes, and what it has learned ({other[0]}) is of use "
            f"for as many classes only as it was trained on."
        )
    learner.load_state_dict({name: state[name] for name in learned}, strict=False)
    return learner
