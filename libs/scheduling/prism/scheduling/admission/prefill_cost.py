"""What a prompt costs that is prefilled together with others.

An engine prefills in passes: all prompts that wait for it go together, up to `pass_tokens` in one pass. A
pass takes a fixed time, for launching its kernels and reading the weights once, however few tokens it has,
and then some time a token. So a prompt that joins a pass which has not begun costs its tokens alone; one that
opens a pass costs the fixed part too. (Scheduling with family setup times: Monma and Potts, "On the
complexity of scheduling with batch setup times", 1989; here a family is a model.)
"""

import msgspec

UNBOUNDED_PASS = 1 << 60


def passes(tokens: int, pass_tokens: int) -> int:
    """How many passes so many tokens take."""
    return -(-tokens // pass_tokens)


class PrefillCost(msgspec.Struct, frozen=True):
    """Seconds of a pass, and of each token in it, on a GPU that does nothing else; tokens that a pass takes
    at most."""

    fixed_s: float
    token_s: float
    pass_tokens: int = UNBOUNDED_PASS

    def joining_s(self, tokens: int, open_tokens: int = 0) -> float:
        """What a prompt of so many tokens adds to passes that hold `open_tokens` and have not begun."""
        more = passes(open_tokens + tokens, self.pass_tokens) - passes(open_tokens, self.pass_tokens)
        return more * self.fixed_s + tokens * self.token_s
