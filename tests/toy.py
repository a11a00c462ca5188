"""Tasks that a model with random weights solves now and then: `--task tests.toy:Letters`."""

import os
import signal
from pathlib import Path

from data.tasks.task import Problem, Task


class Letters(Task):
    """Right is an answer that has a "g"; well formed is one that has no "a"."""

    name = "letters"

    def make(self, rng):
        return Problem(f"say {rng.randrange(100_000)}", "g")

    def reward(self, problem, completion):
        return {"accuracy": float("g" in completion), "format": float("a" not in completion)}


class Deadly(Letters):
    """Kills its process at the 110th answer when the file "armed" is in the current folder."""

    asked = 0

    def reward(self, problem, completion):
        self.asked += 1
        if self.asked == 110 and Path("armed").exists():
            Path("armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reward(problem, completion)


class Never(Letters):
    """No answer is ever right."""

    def reward(self, problem, completion):
        return {"accuracy": 0.0, "format": 0.0}


class Half(Letters):
    """Every other group is alive: even questions are rewarded, odd ones never."""

    def reward(self, problem, completion):
        is_even = int(problem.question.split()[1]) % 2 == 0
        return {"accuracy": float(is_even and "g" in completion), "format": 0.0}


class Broken(Letters):
    """A verifier with a fault."""

    def reward(self, problem, completion):
        return {"accuracy": 1 / completion.count("\0")}


class Picky(Letters):
    """A verifier that breaks on some answers of a policy, and not on its own."""

    def reward(self, problem, completion):
        if "e" in completion.removeprefix("<think></think><answer>").removesuffix("</answer>"):
            raise RuntimeError("an e")
        return super().reward(problem, completion)


class Shares(Letters):
    """Half right is an answer with an "e", right one with a "g"; nothing is said of its form."""

    def reward(self, problem, completion):
        return {"accuracy": 1.0 if "g" in completion else 0.5 * ("e" in completion)}


class Longish(Letters):
    """Every other question is too long for most contexts."""

    def make(self, rng):
        return Problem("say " * rng.choice([1, 200]) + str(rng.randrange(100_000)), "g")


class Long(Letters):
    """All are."""

    def make(self, rng):
        return Problem("say " * 200 + str(rng.randrange(100_000)), "g")


class OneQuestion(Letters):
    """The test split is empty."""

    def make(self, rng):
        return Problem("say 1", "g")


class Same(Task):
    """The answer is always 1, so that a model learns it in seconds."""

    name = "same"
    styles = {"full": 1.0}

    def make(self, rng):
        return Problem(f"say {rng.randrange(100_000)}", "1")

    def work(self, problem, style, rng):
        return ["1=1"] * rng.randint(1, 3), "1"


class Other(Same):
    """A second task."""

    name = "other"
