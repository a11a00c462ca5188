"""The trainer of byte-pair encodings."""

import heapq
import time
from collections import Counter, defaultdict
from typing import Callable, Iterable, Iterator

import regex

# A word with the sign or space before it, one digit, signs, line breaks, spaces: every character is
# in one.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
PIECE = 256  # characters; longer words are counted in pieces
SINGLE = [bytes([byte]) for byte in range(256)]


def pieces(texts: Iterable[str], pattern: str, tell: Callable) -> Iterator[str]:
    """The words of all texts, long ones in pieces, so that no token becomes as long as a text."""
    done = 0
    for text in texts:
        for word in regex.findall(pattern, text):
            yield from (word[i : i + PIECE] for i in range(0, len(word), PIECE))
        done += len(text)
        tell(f"{done / 1e6:.1f} million characters counted")


def teller(log: Callable, every_s: float = 10) -> Callable[[str], None]:
    """Says how far something has come, now and then."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            log(f"tokenizer   {text}")

    return tell


def linked(words: dict[str, int]) -> tuple[list[bytes], list[int], list[int], list[int]]:
    """The bytes of all words in one row of places, each word a linked list.

    Of every place: its bytes, its word's count, and the places before and behind it, or -1.

    >>> linked({"ab": 3})
    ([b'a', b'b'], [3, 3], [-1, 0], [1, -1])
    """
    parts, weights, before, behind = [], [], [], []
    for word, count in words.items():
        first, raw = len(parts), word.encode("utf-8", "replace")
        last = first + len(raw) - 1
        parts += (SINGLE[byte] for byte in raw)
        weights += [count] * len(raw)
        before += [-1, *range(first, last)]
        behind += [*range(first + 1, last + 1), -1]
    return parts, weights, before, behind


def train_bpe(texts: Iterable[str], size: int, pattern: str = PATTERN,
              tell: Callable[[str], None] = lambda text: None) -> dict[bytes, int]:
    """Byte-pair encoding: from 256 bytes on, join the most frequent pair until `size` ranks.

    Distinct words are counted once. A heap holds (-count, pair); an entry whose count has shrunk
    since is put back. An index holds the places of each pair and the parts of all words are a linked
    list, so a merge costs what it changes, whatever the length of a word.

    >>> sorted(train_bpe(["low low lower"], 258), key=len)[-1]
    b'low'
    """
    parts, weights, before, behind = linked(Counter(pieces(texts, pattern, tell)))
    pair_counts, places = Counter(), defaultdict(list)

    def add(left: int, right: int) -> tuple[bytes, bytes]:
        pair = parts[left], parts[right]
        pair_counts[pair] += weights[left]
        places[pair].append(left)
        return pair

    for left, right in enumerate(behind):
        if right >= 0:
            add(left, right)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    ranks = {byte: rank for rank, byte in enumerate(SINGLE)}
    while len(ranks) < size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        tell(f"{len(ranks)} of {size} ranks")
        changed = set()
        for left in sorted(places.pop(pair)):
            right = behind[left]
            if right < 0 or (parts[left], parts[right]) != pair:  # joined with another since
                continue
            one, two = before[left], behind[right]
            if one >= 0:
                pair_counts[parts[one], pair[0]] -= weights[left]
            if two >= 0:
                pair_counts[pair[1], parts[two]] -= weights[left]
                before[two] = left
            parts[left], parts[right], behind[left] = pair[0] + pair[1], b"", two
            if one >= 0:
                changed.add(add(one, left))
            if two >= 0:
                changed.add(add(left, two))
        del pair_counts[pair]
        for after in changed:
            if pair_counts[after] > 0:  # else it was taken apart again: "aa a" in "aaaa"
                heapq.heappush(heap, (-pair_counts[after], after))
    return ranks
