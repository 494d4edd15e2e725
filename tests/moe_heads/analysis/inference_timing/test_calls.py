from moe_heads.analysis.inference_timing.calls import Call


def test_a_call_runs_once_for_each_of_its_arguments() -> None:
    runs = []
    call = Call(lambda a, *, b: runs.append(a - b), (((3,), {"b": 1}), ((5,), {"b": 1})))
    call()
    assert runs == [2, 4]
    assert not call.is_stage
    assert Call(lambda: 1).is_stage


def test_containers_are_copied_before_a_run_once() -> None:
    seen = []
    batch = {"x": 1}
    call = Call(lambda batch: seen.append(batch.pop("x")), (((batch,), {}),))
    for _ in range(2):
        call.restore_inputs()
        call()
    call()  # copied within the run
    assert seen == [1, 1, 1]
    assert batch == {"x": 1}
