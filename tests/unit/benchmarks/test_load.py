"""Load on the endpoint: which answers count as right, and which as errors."""

import pytest

from benchmarks.load import NUM_SOUND, Outcome, Post, body_of, is_right, latencies, results_of

SICK: Outcome = (200, (("screened", None, "infected", 0.25, 0.9),))
HEALTHY: Outcome = (200, (("screened", None, "normal", 0.0, 0.1),))
NO_STUDY: Outcome = (415, (("unsupported_media",),))


def post(
    outcome: Outcome, version: str = "1", body: int = 0, statuses: tuple[int, ...] = ()
) -> Post:
    return Post(
        body=body, statuses=(*statuses, outcome[0]), version=version, outcome=outcome,
        answered_s=1.0, total_s=2.0,
    )  # fmt: skip


EXPECTED = {"1": [SICK, NO_STUDY], "2": [HEALTHY, NO_STUDY]}


@pytest.mark.parametrize(
    ("answered", "expected"),
    [
        (post(SICK, "1"), True),
        (post(HEALTHY, "2"), True),
        (post(HEALTHY, "1"), False),
        (post(NO_STUDY, "", body=1), True),
        (post(NO_STUDY, ""), False),
        (post((200, (("screened", None, "infected", 0.2501, 0.9),)), "1"), False),
        (post((200, (("screened", None, "infected", 0.250001, 0.9),)), "1"), True),
        (post((200, ()), "1"), False),
    ],
)
def test_answer_is_right_if_it_is_that_of_the_version_it_names(
    answered: Post, expected: bool
) -> None:
    assert is_right(answered, EXPECTED) is expected


def test_503_without_retry_after_counts_as_error() -> None:
    posts = [post(SICK, statuses=(503, 503)), post((503, (("busy",),)), ""), post((500, ()), "")]
    values = {result.name: result.value for result in results_of(posts, EXPECTED)}
    assert values["answers of 5xx but 503 with Retry-After"] == "2"
    assert values["answers by status"] == "1 x 200, 1 x 500, 3 x 503"


def test_every_eighth_request_is_hostile_and_all_bodies_are_used() -> None:
    bodies = [body_of(number, NUM_SOUND + 5) for number in range(400)]
    assert set(bodies) == set(range(NUM_SOUND + 5))
    assert sum(body >= NUM_SOUND for body in bodies) == 50


def test_latency_is_of_sound_studies_alone() -> None:
    posts = [post(SICK), post(NO_STUDY, "", body=NUM_SOUND)]
    assert [result.value for result in latencies(posts)] == [
        "1.0 s / 1.0 s / 1.0 s",
        "2.0 s / 2.0 s / 2.0 s",
    ]
