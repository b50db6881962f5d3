from runtime.measuring import machine, median_seconds


def test_pieces_are_measured_in_turn_after_a_warm_up() -> None:
    calls, steps = [], []
    work = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = median_seconds(work, 3, lambda: steps.append(1))
    assert calls == ["a", "b"] * 4
    assert len(steps) == 8
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_the_machine_is_described() -> None:
    assert machine().keys() == {"device", "cores", "threads", "python", "torch", "transformers"}
