"""Runs that go on in the data of a checkpoint, with iterators and loaders of the user's own."""

import torch
import training


class Reader:
    """Micro-batches by number; knows where it is."""

    def __init__(self, seed=3):
        self.seed, self.read = seed, 0

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.read)
        self.read += 1
        tokens = torch.randint(0, training.VOCABULARY, (2, training.LENGTH + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]


class OwnLoader:
    """Knows its position, which its iterators do not."""

    def __init__(self):
        self.reader = Reader()

    def __iter__(self):
        yield from iter(self.reader)

    def state_dict(self):
        return self.reader.state_dict()

    def load_state_dict(self, state):
        self.reader.load_state_dict(state)


def start():
    import dualpipe_engine

    config = training.settings(4, zero=0, schedule="dualpipe")
    return dualpipe_engine.initialize(model=training.make_module(2, 2), config=config)[0]


def goes_on(folder):
    """The loss of the third batch: of the run that has saved after two, and of runs that load; and what an evaluation
    between loading and training has read."""
    engine, reader = start(), Reader()
    for _ in range(2):
        engine.train_batch(reader)
    engine.save_checkpoint(folder, "iterator")
    losses = {"saved": float(engine.train_batch(reader))}
    engine.destroy()

    engine, evaluated = start(), Reader(seed=5)
    engine.load_checkpoint(folder, "iterator")
    engine.eval_batch(evaluated)
    engine.save_checkpoint(folder, "at once")
    losses["evaluated first"] = float(engine.train_batch(Reader()))
    engine.load_checkpoint(folder, "at once")
    losses["saved at once"] = float(engine.train_batch())
    engine.destroy()

    engine = start()
    engine.set_dataloader(OwnLoader())
    for _ in range(2):
        engine.train_batch()
    engine.save_checkpoint(folder, "loader")
    engine.train_batch()
    engine.load_checkpoint(folder, "loader")
    losses["loader, then load"] = float(engine.train_batch())
    engine.destroy()

    engine = start()
    engine.load_checkpoint(folder, "loader")
    engine.set_dataloader(OwnLoader())
    losses["load, then loader"] = float(engine.train_batch())
    engine.destroy()
    return losses, evaluated.read
