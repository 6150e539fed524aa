from __future__ import annotations

from clip_ray.data.quarantine import BadSample, count_reasons, summarise


def test_a_summary_names_the_top_reasons_with_examples() -> None:
    rows = [BadSample(f"k{i}", "truncated", "cut", "s.tar") for i in range(5)]
    rows += [BadSample("q", "aspect"), BadSample("r", "aspect"), BadSample("s", "empty")]
    assert summarise(rows, reasons=2) == (
        "5 x truncated: k0 in s.tar (cut); k1 in s.tar (cut)\n"
        "2 x aspect: q; r\n"
        "1 for 1 other reasons"
    )
    assert summarise([]) == ""


def test_recomputed_steps_count_once() -> None:
    def row(attempt: int, step: int, reason: str) -> dict:
        return {"attempt": attempt, "step": step, "reason": reason}

    rows = [row(1, 0, "aspect"), row(1, 4, "truncated"), row(1, 5, "truncated"), row(1, 6, "lost")]
    rows += [row(2, 5, "truncated"), row(2, 6, "lost"), row(2, 6, "lost"), row(2, 9, "lost")]
    # The first attempt led up to step 5; the second went on from there, up to step 7.
    led = [{"attempt": 1, "step": step} for step in range(1, 6)]
    led += [{"attempt": 2, "step": step} for step in (6, 7)]
    found = count_reasons(rows, led)
    assert list(found.items()) == [("lost", 2), ("truncated", 2), ("aspect", 1)]
