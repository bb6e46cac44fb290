"""Cases of DICOM objects that are there twice, and of contrast."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from chests import chest, datasets, enhanced, pixels, save, set_pixels, set_uid, to_bytes, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as ItemSequence
from right_rows import Case, Right, refused, sound

# 15: objects that are there twice


def twice(folder: Path, name: str, *, copies: Sequence[int], times: int = 1) -> Right:
    """Write some objects again, byte for byte, under other names."""
    objects = [to_bytes(dataset) for dataset in datasets(name)]
    write(folder, {f"IM{index:04d}.dcm": data for index, data in enumerate(objects)})
    for number in range(1, times + 1):
        write(folder, {f"IM{index:04d} ({number}).dcm": objects[index] for index in copies})
    return Right(rows=(sound(chest(), "duplicate_objects"),), hu=chest().hu)


def almost_twice(folder: Path, name: str, *, is_other_object: bool) -> Right:
    """Write a second slice at the place of one: other pixels, or another object with the same."""
    series = datasets(name)
    again = copy.deepcopy(series[5])
    if is_other_object:
        set_uid(again, f"{again.SOPInstanceUID[:60]}.9")
    else:
        set_pixels(again, pixels(again) + 1)
    save(folder, [*series, again])
    return Right(rows=(refused("duplicate_slice"),))


# 16: contrast


def contrast(folder: Path, name: str, *, agent: str, is_given: bool) -> Right:
    series = datasets(name)
    for dataset in series:
        dataset.ContrastBolusAgent = agent
    save(folder, series)
    return Right(rows=(sound(chest(), *(("contrast",) if is_given else ())),))


def enhanced_contrast(folder: Path, name: str, *, is_given: bool) -> Right:
    whole = enhanced(datasets(name))
    agents = []
    if is_given:
        agent = Dataset()
        agent.CodeValue, agent.CodingSchemeDesignator, agent.CodeMeaning = (
            "C-B0322",
            "SRT",
            "Iohexol",
        )
        agents = [agent]
    whole.ContrastBolusAgentSequence = ItemSequence(agents)
    save(folder, [whole])
    return Right(rows=(sound(chest(), *(("contrast",) if is_given else ())),), hu=chest().hu)


def cases() -> Iterator[tuple[str, Case]]:
    """Yield the cases by their names."""
    yield "15_two_objects_twice", partial(twice, copies=(3, 4))
    yield "15_all_objects_twice", partial(twice, copies=range(24))
    yield "15_one_object_thrice", partial(twice, copies=(7,), times=2)
    yield "15_same_uid_other_pixels", partial(almost_twice, is_other_object=False)
    yield "15_other_uid_same_pixels", partial(almost_twice, is_other_object=True)
    for agent in ("NONE", "None", "none ", "NO", "No contrast", "WITHOUT CONTRAST", ""):
        word = agent.replace(" ", "_") or "empty"
        yield f"16_contrast_not_{word}", partial(contrast, agent=agent, is_given=False)
    for agent in ("OMNIPAQUE 350", "IV", "yes", "Nonionic iodine", "APPLIED"):
        yield (
            f"16_contrast_{agent.replace(' ', '_')}",
            partial(contrast, agent=agent, is_given=True),
        )
    yield "16_contrast_enhanced", partial(enhanced_contrast, is_given=True)
    yield "16_contrast_enhanced_not", partial(enhanced_contrast, is_given=False)
