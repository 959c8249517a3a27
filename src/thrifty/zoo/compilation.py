"""From a trained model to a program that runs without torch: the network, its classes and its preprocessing."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.numpy import load_file
from torch import nn

from thrifty.files import sha256
from thrifty.lowering import lower
from thrifty.program import Preprocessing, Program
from thrifty.program_file import save_program
from thrifty.zoo.records import Record
from thrifty.zoo.store import ModelCard, load_model


def program_of(model: nn.Module, card: ModelCard) -> Program:
    """The program of a trained model, with the classes and the preprocessing that its card tells."""
    return lower(model, torch.zeros(1, 3, card.size, card.size), Preprocessing(card.mean, card.std), card.classes)


def compile_record(record: Record) -> Record:
    """Make a zoo model's program anew, to be read beside its weights, and its record with the sum of the file."""
    save_program(program_of(*load_model(record.path)), record.program, load_file(record.path))
    compiled = replace(record, program_sha256=sha256(record.program))
    compiled.write()
    return compiled
