from moe_heads.analysis.inference_timing.stages import divided


def test_the_last_part_is_what_the_others_leave_and_all_add_up() -> None:
    rounds = {name: [[[ms]] * 8] for name, ms in {"router": 2.0, "dispatch": 1.0, "combine": 0.5}.items()}
    parts = divided(32, "head", [[[10.0]] * 8], rounds, "experts", seed=0)
    assert [(part.name, part.ms, part.how) for part in parts] == [
        ("router", 2.0, "timed alone"),
        ("dispatch", 1.0, "timed alone"),
        ("combine", 0.5, "timed alone"),
        ("experts", 6.5, "by difference"),
    ]
    assert sum(part.ms for part in parts) == 10
    assert all((part.batch_size, part.whole) == (32, "head") for part in parts)
    # nothing varies within the run, and what differs between runs is in no interval
    assert all(part.low_ms == part.ms == part.high_ms for part in parts)


def test_parts_are_of_the_rounds_that_all_took_part_in() -> None:
    whole, router = [[10.0]] * 6 + [[30.0]] * 20, [[2.0]] * 6
    router_part, rest = divided(1, "head", [whole], {"router": [router]}, "experts", seed=0)
    assert (router_part.ms, rest.ms, rest.low_ms, rest.high_ms) == (2.0, 8.0, 8.0, 8.0)


def test_the_error_of_a_difference_is_that_of_both() -> None:
    whole = [[10.0 + i % 3] for i in range(12)]
    *_, rest = divided(1, "model", [whole], {"backbone": [[[9.0 + i % 2] for i in range(12)]]}, "rest", seed=0)
    # the whole alone varies by 2, the backbone by 1
    assert rest.ms == 1.5
    assert 0 < rest.low_ms < rest.ms < rest.high_ms < 3
