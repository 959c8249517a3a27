"""From a recipe to what it trains: photographs, model and teacher, all on the CPU still."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.data import loader, sources
from thrifty.data.augment import normalise
from thrifty.data.images import ImageSet
from thrifty.dynamic import evaluating
from thrifty.errors import CheckpointError, RecipeError
from thrifty.train.recipe import Recipe
from thrifty.zoo.resolve import build_net, is_own
from thrifty.zoo.store import find_weights, load_into, load_model, read_card


def load_data(recipe: Recipe) -> tuple[ImageSet, ImageSet]:
    """Photographs to train on and photographs held out, the same ones whatever the recipe's seed.

    Raises:
        DataError: photographs are missing or unreadable, or none is left to train on.
    """
    section = recipe.data
    images = sources.load(section.source, section.root, "train", section.size)
    return loader.split(images, section.validation, seed=0)


def build_model(recipe: Recipe, images: ImageSet) -> nn.Module:
    """The recipe's network with the weights to start from, converted where the recipe names a method.

    Raises:
        CheckpointError: the weights to start from, or the number of logits, don't fit.
        RecipeError: the network doesn't take the photographs or doesn't return logits.
    """
    section = recipe.model
    model = build_net(section.net, **section.arguments)
    example = normalise(images.images(torch.arange(1)), recipe.data.mean, recipe.data.std)
    start: nn.Module | None = None
    if section.weights is not None:
        start, card = load_model(section.weights, build_net(section.net, **section.arguments))
        if card.method is None:
            model, start = start, None
    _check_network(model.eval(), section.net, example, images)
    method = recipe.method_config()
    if method is not None:
        model = convert(model, method, example=example, inplace=True)
    if start is not None:  # of a dynamic model, which fits a dynamic one only
        load_into(model, start.state_dict(), section.weights)
    return model.train()


def build_teacher(recipe: Recipe, images: ImageSet) -> nn.Module | None:
    """The model to distil from, in evaluation mode and without gradients, or None.

    Raises:
        CheckpointError: there is no such model, or it was trained on other classes or with another normalisation.
    """
    if recipe.distill is None:
        return None
    source = recipe.distill.teacher
    path = find_weights(source)
    card = read_card(path)
    own = card.net == recipe.model.net and is_own(card.net)  # code that the recipe names may run
    teacher, _ = load_model(path, build_net(card.net, **card.arguments) if own else None)
    data = recipe.data
    if card.classes != images.classes:
        raise CheckpointError(
            f"teacher {source} knows the classes {', '.join(card.classes[:12])}; this run has "
            f"{', '.join(images.classes[:12])}. Choose a teacher that was trained on the same classes in this order."
        )
    if (card.mean, card.std) != (data.mean, data.std):
        raise CheckpointError(
            f"teacher {source} takes mean {card.mean} and std {card.std}; this run has mean {data.mean} and std "
            f"{data.std}. Choose a teacher that was trained with the same data settings."
        )
    return teacher.eval().requires_grad_(False)


def check_logits(logits: object, net: str) -> Tensor:
    """`logits`, or an error where they are not a tensor [N, classes]."""
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise RecipeError(
        f"network {net} must return logits [N, classes], but returns {given}. Switch auxiliary outputs off in "
        "model.arguments."
    )


def _check_network(model: nn.Module, net: str, example: Tensor, images: ImageSet) -> None:
    try:
        with evaluating(model):
            logits = model(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise RecipeError(
            f"network {net} does not take photographs of {images.size} px: {' '.join(str(error).split())}. "
            "Set data.size to what it takes."
        ) from error
    outputs = check_logits(logits, net).shape[1]
    if outputs != len(images.classes):
        raise CheckpointError(
            f"network {net} gives {outputs} logits, the data has {len(images.classes)} classes. "
            "Set the number of classes in model.arguments."
        )
