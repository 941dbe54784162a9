"""Random bits as a pure function of what they belong to, by integer hashing on any device.

Dropout whose mask is drawn from a generator depends on the layout of ranks, on packing, on
recomputation and on where a run was resumed. Here a bit is a hash of (row, channel, layer), and
the number of a row is a hash of (seed, epoch, source, sample, position in the document), made
where documents are packed.

The mixers are multiply-xorshift rounds (SplitMix64, Steele et al. 2014; "lowbias32" keeps two of
its rounds because both of its inputs are mixed already). Cost: six passes over 4-byte integers.

T packed rows   C channels
"""

import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # SplitMix64
_MIX_32 = (0x7FEB352D, 0x846CA68B)  # lowbias32 (Wellons 2018)


def _signed(number: int, bits: int) -> int:
    """The same bits as a signed integer, which is what torch computes with."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def seed_of(*key: object) -> int:
    """A signed 64-bit number for a key, the same on every platform."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def mix(numbers: Tensor) -> Tensor:
    """Hash int64 numbers one by one; every output bit depends on every input bit."""
    out = numbers
    for shift, factor in zip((30, 27), _MIX, strict=True):
        out = out ^ _shifted(out, shift)
        out = out * _signed(factor, 64)
    return out ^ _shifted(out, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def row_numbers(seed: int, length: int) -> Tensor:
    """One int64 number for each position of a document; `seed` tells documents apart."""
    return numbers_at(seed, torch.arange(length))


def numbers_at(seeds: int | Tensor, positions: Tensor) -> Tensor:
    """`row_numbers` of some positions, of one document or of as many as there are seeds."""
    return mix(seeds + positions * _signed(_GOLDEN, 64))


def uniforms(seeds_N: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 `[N, count]`: a stream of SplitMix64 for each int64 seed."""
    steps = torch.arange(1, count + 1, device=seeds_N.device) * _signed(_GOLDEN, 64)
    return _shifted(mix(seeds_N[:, None] + steps), 11).double() * 2.0**-53


def normals(seeds_N: Tensor, count: int) -> Tensor:
    """Standard normal numbers, float32 `[N, count]`, by Box and Muller from `uniforms`.

    Computed in float64, so that devices agree to the last float32 bit or the one before it.
    """
    half = (count + 1) // 2
    first, second = uniforms(seeds_N, 2 * half).chunk(2, 1)
    radius, angle = torch.sqrt(-2 * torch.log1p(-first)), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].float()


@dataclass(frozen=True)
class RowNoise:
    """Noise of the rows of a micro-batch: where every layer draws its bits from.

    Attributes:
        rows_T: int64, one number per row (`row_numbers`).
    """

    rows_T: Tensor
    _columns: dict[Hashable, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def chosen(self, salt: int, channels: range, rate: float) -> Tensor:
        """Boolean `[T, C]`, true with probability `rate`, independent in rows, channels and salts.

        Args:
            salt: tells apart the layers that draw for the same channels.
            channels: numbers of the channels in the full layer, so that tensor ranks which hold a
                part of them draw the same bits as one rank.
            rate: probability of true, exact to 2^-32, below 1.
        """
        row_T = mix(self.rows_T ^ salt) >> 32  # in the range of int32, sign and all
        bits_TC = row_T.to(torch.int32)[:, None] ^ self._column_numbers(channels)
        bits_TC *= _signed(_MIX_32[0], 32)
        bits_TC ^= bits_TC >> 15
        bits_TC *= _signed(_MIX_32[1], 32)
        return bits_TC < round(rate * 2**32) - 2**31

    def _column_numbers(self, channels: range) -> Tensor:
        if channels not in self._columns:
            numbers = torch.arange(channels.start, channels.stop, device=self.rows_T.device)
            self._columns[channels] = (mix((numbers + 1) * _signed(_GOLDEN, 64)) >> 32).to(
                torch.int32
            )
        return self._columns[channels]
