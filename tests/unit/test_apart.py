"""What a decoder dies of is told by a process of its own; nobody else's trouble blames an image."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from pipeline.networks.apart import Apart, Limits
from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError
from tests.corpus import bad_images, encoded, good_images, slow_image

SLOW = slow_image()


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart(Limits()) as decoder:
        yield decoder


def test_images_are_decoded_as_ever(apart: Apart) -> None:
    for content in good_images().values():
        np.testing.assert_array_equal(apart.decode(content, 32), decode(content, 32))
    for content, word in bad_images().values():
        with pytest.raises(BadImageError, match=word):
            apart.decode(content, 32)


def test_a_decoder_that_takes_too_long_is_ended_twice_and_the_next_image_is_decoded() -> None:
    with Apart(Limits(seconds=0.2)) as apart:
        with pytest.raises(BadImageError) as refused:
            apart.decode(SLOW, 224)
        assert str(refused.value) == "too slow: more than 0.2 s of a processor, twice, alone"
        good = good_images()["kinds/jpeg.jpg"]
        np.testing.assert_array_equal(apart.decode(good, 32), decode(good, 32))


def test_a_decoder_that_takes_too_much_memory_is_refused_it() -> None:
    large = encoded(Image.new("RGB", (4000, 2900)), "PNG")
    with Apart(Limits(memory=24 << 20)) as apart:
        with pytest.raises(BadImageError) as refused:
            apart.decode(large, 224)
        assert str(refused.value) == "too much memory: more than 24 MB, twice, alone"
        good = good_images()["kinds/jpeg.jpg"]
        np.testing.assert_array_equal(apart.decode(good, 32), decode(good, 32))
    with Apart(Limits()) as apart:
        assert apart.decode(large, 224).shape == (224, 224, 3)


@contextmanager
def sending(number: int, apart: Apart, times: int) -> Iterator[list[int]]:
    """Send a signal to a decoder while it is in the codec, so many times."""
    hit: list[int] = []

    def watch() -> None:
        while len(hit) < times:
            process = apart.process
            if apart.line is not None and process is not None and process.pid not in hit:
                time.sleep(0.2)
                os.kill(process.pid, number)
                hit.append(process.pid)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield hit
    watcher.join(30)


def test_a_codec_that_crashes_twice_is_the_images_fault() -> None:
    with (
        Apart(Limits()) as apart,
        sending(signal.SIGSEGV, apart, times=2) as hit,
        pytest.raises(BadImageError) as refused,
    ):
        apart.decode(SLOW, 224)
    assert str(refused.value) == "crashes the decoder: SIGSEGV, twice, alone"
    assert len(hit) == 2


def test_a_codec_that_crashes_once_is_tried_again() -> None:
    with Apart(Limits()) as apart, sending(signal.SIGBUS, apart, times=1) as hit:
        assert apart.decode(SLOW, 224).shape == (224, 224, 3)
    assert len(hit) == 1


def test_a_decoder_that_others_end_blames_no_image() -> None:
    with (
        Apart(Limits()) as apart,
        sending(signal.SIGKILL, apart, times=1),
        pytest.raises(MemoryError, match="memory is short"),
    ):
        apart.decode(SLOW, 224)


def test_a_decoder_that_stands_still_blames_no_image() -> None:
    limits = Limits(seconds=0.3, patience=2)
    with (
        Apart(limits) as apart,
        sending(signal.SIGSTOP, apart, times=1),
        pytest.raises(OSError, match="no processor or memory for it"),
    ):
        apart.decode(SLOW, 224)


def test_no_decoder_outlives_who_asked_it() -> None:
    with Apart(Limits()) as apart:
        apart.decode(good_images()["kinds/jpeg.jpg"], 32)
        process = apart.process
    assert process is not None
    assert process.poll() is not None
