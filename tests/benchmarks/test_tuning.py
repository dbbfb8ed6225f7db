"""Tuning: the same budget for every method, stages that build on one another, and who reads the result."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import embedded, style_rates, trials, tuned, tuning
from continual_concepts.benchmarks.continual.concepts import STYLES, concepts, tuning_concepts, tuning_styles
from continual_concepts.benchmarks.continual.runs import Run, settings_for
from continual_concepts.benchmarks.continual.trials import run_of
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, get
from continual_concepts.tests.benchmarks.runs_made import levels, run

TASKS = 6      # of the tuning suite


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A result of tuning on the base `abc`, in place of the committed one."""
    path = tmp_path / "tuning.json"
    content = {"base": "abc", "methods": {
        "bound": {"chosen": {"lr": 0.001, "token_lr": 0.01, "steps": 400}, "trials": [{}] * 9},
        "ewc": {"trials": [{}] * 4}}}
    path.write_text(json.dumps(content))
    monkeypatch.setattr(tuned, "FILE", path)
    return path


def test_every_method_has_the_same_budget_of_valid_settings():
    for method in METHODS:
        best, count = {}, 0
        for stage in range(tuning.STAGES):
            of_stage = trials.stage_trials(method, stage, best)
            count += len(of_stage)
            for trial in of_stage:
                planned = tuning.run_of(method, trial, 6)
                settings = {**embedded.usual_settings(method), **planned.settings()}
                config = get(method).config(**settings)
                assert planned.steps(1) == trial["steps"] and config.token_lr > 0
            names = {json.dumps(trial, sort_keys=True) for trial in of_stage}
            assert len(names) == len(of_stage) and json.dumps(best, sort_keys=True) not in names
            best = of_stage[0]
        styles = style_rates.trials_of(best)
        assert styles[0] == best and styles[1] == {**best, "style_rate": 4.0}
        assert count + trials.FINALISTS + len(styles) == tuning.BUDGET == 12


def test_strengths_are_settings_of_their_methods():
    for method, name in trials.STRENGTHS.items():
        assert method in METHODS and name in {entry.name for entry in fields(get(method).config)}
        assert trials.strength_of(method) is None or trials.strength_of(method)[1] > 0
    assert trials.strength_of("bound") is None


class Finished:
    """A folder of finished trials whose objective is best for given settings, and better near that rate."""

    def __init__(self, folder, prefer):
        self.folder, self.prefer = folder, prefer
        self.tuning = tuning.Tuning(["ewc"], folder, levels(), TASKS, levels())

    def finish(self, runs):
        for planned in runs:
            is_of_styles = planned.tasks == STYLES
            settings = {**planned.settings(), "steps": planned.steps(0)}
            good = sum(settings.get(name) == pytest.approx(value) for name, value in self.prefer.items())
            near = -0.01 * abs(math.log2(settings["lr"] / self.prefer.get("lr", settings["lr"])))
            made = run("ewc", 0, 71, alone=(0.4 + 0.1 * good + near,) * 4)
            folder = style_rates.folder_of(self.folder) if is_of_styles else self.folder
            folder.mkdir(exist_ok=True)
            (folder / f"{planned.name}.json").write_text(json.dumps(made))


def test_each_stage_starts_from_the_best_of_the_earlier_ones(tmp_path):
    usual = trials.strength_of("ewc")[1]
    best = {"lr": 1e-3, "token_lr": 1e-2, "tie": 10 * usual, "steps": 200}
    finished = Finished(tmp_path, best)
    for size in (4, 2, 2, 2):
        assert "chosen" not in finished.tuning.to_json("abc")["methods"]["ewc"]
        wanted = finished.tuning.wanted()
        assert len(wanted) == size
        finished.finish(wanted)
    assert finished.tuning.wanted() == []
    assert "chosen" not in finished.tuning.to_json("abc")["methods"]["ewc"]      # styles are missing
    finished.finish(finished.tuning.wanted_styles())
    entry = finished.tuning.to_json("abc")["methods"]["ewc"]
    assert entry["chosen"] == pytest.approx(best) and len(entry["trials"]) == tuning.BUDGET
    for trial in entry["trials"]:
        needed = {"stage", "settings", "alone"} | ({"combined", "objective"} if trial["stage"] < 4 else set())
        assert needed <= set(trial)


def test_a_trial_that_fails_is_recorded_and_not_chosen(tmp_path):
    finished = Finished(tmp_path, {})
    wanted = finished.tuning.wanted()
    finished.finish(wanted[1:])
    (tmp_path / f"{wanted[0].name}.json").write_text(json.dumps({"method": "ewc", "failed": "NaN"}))
    done, trials, _ = finished.tuning.of("ewc")
    assert done[0]["failed"] == "NaN" and "objective" not in done[0] and len(trials) == 2
    assert all(trial.settings()["lr"] == pytest.approx(5e-4) for trial in trials)


def trial(lr, objective, seed=tuning.SEED, **other):
    return {"settings": {"lr": lr, **other}, "seed": seed, "objective": objective}


def test_finalists_are_the_best_of_the_two_best_rates():
    found = tuning.finalists([trial(1.0, 0.5), trial(1.0, 0.7, steps=9), trial(2.0, 0.6), trial(3.0, 0.1),
                              {"settings": {"lr": 4.0}, "failed": "NaN"}])
    assert found == [{"lr": 1.0, "steps": 9}, {"lr": 2.0}]
    assert tuning.finalists([trial(1.0, 0.5)]) == [{"lr": 1.0}]


def test_of_finalists_that_cannot_be_told_apart_the_one_that_learns_more_wins():
    """TARA: 0.417 and 0.416, where the lower rate hardly learned the concepts of the benchmark."""
    def result(rate, objective, alone):
        return {"settings": {"lr": rate}, "objective": objective, "alone": alone}

    slow, quick = {"lr": 0.0005}, {"lr": 0.004}
    equal = [result(0.0005, 0.441, 0.44), result(0.0005, 0.392, 0.44), result(0.004, 0.423, 0.56),
             result(0.004, 0.408, 0.56)]
    assert trials.winner([slow, quick], equal) == quick
    assert trials.winner([slow, quick], [*equal, result(0.0005, 0.441, 0.44)]) == slow      # 0.425: no tie
    failed = {"settings": quick, "failed": "diverged"}
    assert trials.winner([slow, quick], [*equal, failed]) == slow


def test_a_second_seed_decides_between_the_finalists(tmp_path):
    finished = Finished(tmp_path, {"lr": 1e-3})
    while any(run.seed == tuning.SEED for run in finished.tuning.wanted()):
        finished.finish(finished.tuning.wanted())
    first, second = finished.tuning.wanted()
    assert first.seed == second.seed == tuning.SECOND_SEED
    assert first.settings()["lr"] == pytest.approx(1e-3) != second.settings()["lr"]
    worse = run("ewc", 0, 72, alone=(0.1,) * 4)
    (tmp_path / f"{first.name}.json").write_text(json.dumps(worse))
    assert len(finished.tuning.wanted()) == 2 and finished.tuning.of("ewc")[2] is None
    finished.finish([second])
    assert finished.tuning.of("ewc")[2]["lr"] == pytest.approx(second.settings()["lr"])
    (tmp_path / f"{first.name}.json").write_text(json.dumps(run("ewc", 0, 72, alone=(0.5,) * 4)))
    (tmp_path / f"{second.name}.json").write_text(json.dumps({"method": "ewc", "failed": "NaN"}))
    assert finished.tuning.of("ewc")[2]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("edge, next_ones", [(4e-3, (8e-3, 16e-3)), (2.5e-4, (1.25e-4, 6.25e-5))])
def test_a_best_rate_at_the_edge_is_followed_by_rates_beyond_it(tmp_path, edge, next_ones):
    finished, first = Finished(tmp_path, {"lr": edge}), next_ones[0]
    while not any(run.settings()["lr"] == pytest.approx(first) for run in finished.tuning.wanted()):
        finished.finish(finished.tuning.wanted())
    wanted = finished.tuning.wanted()
    assert [run.seed for run in wanted] == [tuning.SEED, tuning.SECOND_SEED]
    finished.finish(wanted)      # no better than the edge
    assert finished.tuning.of("ewc")[2]["lr"] == pytest.approx(edge) and not finished.tuning.wanted()
    for planned in wanted:
        better = run("ewc", 0, planned.seed, alone=(0.9,) * 4)
        (tmp_path / f"{planned.name}.json").write_text(json.dumps(better))
    further = [run.settings()["lr"] for run in finished.tuning.wanted()]
    assert further == pytest.approx([next_ones[1]] * 2)
    finished.finish(finished.tuning.wanted())
    chosen = finished.tuning.of("ewc")[2]
    assert chosen["lr"] == pytest.approx(first) and chosen["token_lr"] == pytest.approx(10 * first)


def test_rates_beyond_the_edge_end_where_pictures_hold_nan(tmp_path):
    finished = Finished(tmp_path, {"lr": 4e-3})
    while not any(run.settings()["lr"] == pytest.approx(8e-3) for run in finished.tuning.wanted()):
        finished.finish(finished.tuning.wanted())
    for planned in finished.tuning.wanted():
        broken = run("ewc", 0, planned.seed, alone=(float("nan"),) * 4)
        (tmp_path / f"{planned.name}.json").write_text(json.dumps(broken))
    done, wanted, chosen = finished.tuning.of("ewc")
    assert not wanted and chosen["lr"] == pytest.approx(4e-3)
    beyond = [each for each in done if each["settings"]["lr"] == pytest.approx(8e-3)]
    assert len(beyond) == 2 and not any("objective" in each for each in beyond)


def test_the_factor_of_styles_is_the_one_whose_styles_are_more_like_real_ones(tmp_path):
    finished = Finished(tmp_path, {"lr": 1e-3})
    assert finished.tuning.wanted_styles() == []
    while finished.tuning.of("ewc")[2] is None:
        finished.finish(finished.tuning.wanted())
    usual, faster = finished.tuning.wanted_styles()
    assert faster.settings()["style_rate"] == 4.0 and "style_rate" not in usual.settings()
    assert usual.tasks == faster.tasks == STYLES and usual.name != faster.name
    for better, worse, factor in ((usual, faster, None), (faster, usual, 4.0)):
        for planned, alone in ((better, 0.6), (worse, 0.5)):
            path = style_rates.folder_of(tmp_path) / f"{planned.name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(run("ewc", 0, 71, alone=(alone,) * 4)))
        entry = finished.tuning.to_json("abc")["methods"]["ewc"]
        assert entry["chosen"].get("style_rate") == factor and len(entry["trials"]) == tuning.BUDGET
    (style_rates.folder_of(tmp_path) / f"{faster.name}.json").write_text(
        json.dumps({"method": "ewc", "failed": "NaN"}))
    assert "style_rate" not in finished.tuning.to_json("abc")["methods"]["ewc"]["chosen"]


def test_styles_for_tuning_are_not_those_of_the_benchmark():
    known = [concept.style for concept in (*concepts(50), *tuning_concepts()) if concept.style]
    mine = [concept.style for concept in tuning_styles()]
    assert len(mine) == STYLES and not any(one.paper == other.paper for one in mine for other in known)


def test_the_objective_is_the_mean_of_alone_and_combined_by_all_judges():
    found = tuning.figures(run(alone=(0.9,) * 4, combined=0.55), levels())
    assert found["alone"] == pytest.approx(1) and found["combined"] == pytest.approx(0.5)
    assert found["objective"] == pytest.approx(0.75)


def test_the_benchmark_reads_what_was_chosen(file):
    assert embedded.settings_of("bound", "abc") == {"lr": 0.001, "token_lr": 0.01}
    assert tuned.chosen_steps("bound", "abc") == 400 and tuned.trials("bound", "abc") == 9
    # another base, a method that is still being tuned, and one that is not
    for method, base in (("bound", "xyz"), ("ewc", "abc"), ("l2dm", "abc")):
        assert embedded.settings_of(method, base) == embedded.usual_settings(method)
        assert tuned.chosen_steps(method, base) is None


def test_the_rate_of_styles_reaches_methods_as_rates(file):
    content = json.loads(file.read_text())
    content["methods"]["bound"]["chosen"]["style_rate"] = 4.0
    file.write_text(json.dumps(content))
    tuned._read.cache_clear()
    of = {kind: embedded.settings_of_kind("bound", "abc", kind) for kind in ("object", "style")}
    assert of == {"object": {"lr": 0.001, "token_lr": 0.01}, "style": {"lr": 0.004, "token_lr": 0.04}}


def test_without_a_file_the_usual_settings_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FILE", tmp_path / "none.json")
    assert embedded.settings_of("bound", "abc") == embedded.RATES and tuned.trials("bound", "abc") == 0


def test_a_broken_file_is_named(file):
    file.with_name("other.json").write_text("[]")
    with pytest.raises(ConceptError, match="other.json' is no result of the command tune"):
        tuned._read(file.with_name("other.json"))


def test_styles_whose_pictures_hold_nan_are_not_chosen(tmp_path):
    runs = [run_of("bound", settings, STYLES) for settings in style_rates.trials_of({"lr": 0.1})]
    folder = style_rates.folder_of(tmp_path)
    folder.mkdir()
    for planned, alone_share in zip(runs, (float("nan"), 0.6), strict=True):
        (folder / f"{planned.name}.json").write_text(json.dumps(run(alone=(alone_share,) * 4)))
    found = style_rates.results(runs, style_rates.trials_of({"lr": 0.1}), tmp_path, levels(), {})
    assert ["alone" in each for each in found] == [False, True]
    assert style_rates.best(found) == {"lr": 0.1, "style_rate": 4.0}


@pytest.mark.parametrize(("methods", "sentence"), [
    ("nonsense", "unknown method 'nonsense'"), ("bound+rank=2", "methods names 'bound+rank=2'"),
])
def test_bad_input_is_named(capsys, methods, sentence):
    assert main(["tune", "--methods", methods]) == 1 and sentence in capsys.readouterr().err


def test_names_of_trials_are_allowed_names_of_files():
    planned = tuning.run_of("clora", {"lr": 5e-4, "token_lr": 0.005, "forget": 1e9, "steps": 200}, 6)
    assert planned == Run("clora", 6, 0, 71, overrides="forget=1e09+lr=0.0005+steps=200+token_lr=0.005")


@pytest.mark.slow
def test_the_command_tunes_a_method_and_continues(tmp_path, monkeypatch, capsys):
    """Two concepts, one sampling step and trials of one or two steps."""
    monkeypatch.setattr(embedded, "SETTINGS", replace(embedded.SETTINGS, steps=1))
    monkeypatch.setattr(tuning, "tuning_concepts", lambda: tuning_concepts()[:2])
    monkeypatch.setattr(tuning, "tuning_styles", lambda: tuning_styles()[:2])
    monkeypatch.setattr(trials, "STYLES", 2)
    monkeypatch.setattr(tuning, "STYLES", 2)
    monkeypatch.setattr(trials, "STEPS", 1)
    monkeypatch.setattr(trials, "FIRST_STEPS", 2)
    for name in ("PICTURES", "GROUP_PICTURES", "PAIR_PICTURES"):
        monkeypatch.setattr(tuning, name, 2)
    file = tmp_path / "tuning.json"
    assert main(["tune", "--json", str(file), "--methods", "textual_inversion"]) == 0
    result = json.loads(file.read_text())
    entry = result["methods"]["textual_inversion"]
    assert len(entry["trials"]) >= result["budget"] == 12 and result["base"]
    repeated = [each["settings"] for each in entry["trials"] if each["seed"] == tuning.SECOND_SEED]
    assert len(repeated) >= 2 and settings_for(entry["chosen"], "object") in repeated
    monkeypatch.setattr(tuned, "FILE", file)
    assert tuned.chosen_steps("textual_inversion", result["base"]) == entry["chosen"]["steps"]
    capsys.readouterr()
    assert main(["tune", "--json", str(file), "--methods", "textual_inversion"]) == 0
    assert json.loads(file.read_text()) == result and "finished" not in capsys.readouterr().err


def test_a_result_is_enough_to_continue_in_another_folder(tmp_path):
    finished = Finished(tmp_path, {"lr": 1e-3})
    finished.finish(finished.tuning.wanted())
    finished.finish(finished.tuning.wanted())
    first = finished.tuning.to_json("abc")["methods"]
    known = trials.known_trials(json.loads(json.dumps(first)), TASKS)
    elsewhere = tuning.Tuning(["ewc"], tmp_path / "other", levels(), TASKS, levels(), known)
    assert elsewhere.to_json("abc")["methods"] == first
    assert elsewhere.wanted() == finished.tuning.wanted()
    assert len(elsewhere.wanted()) == len(trials.MORE_STEPS_FACTORS)


def test_known_trials_of_styles_are_not_repeated(tmp_path):
    finished = Finished(tmp_path, {"lr": 1e-3})
    while (runs := [run for run in finished.tuning.wanted() if not (tmp_path / f"{run.name}.json").exists()]):
        finished.finish(runs)
    finished.finish(finished.tuning.wanted_styles())
    first = finished.tuning.to_json("abc")["methods"]
    elsewhere = tuning.Tuning(["ewc"], tmp_path / "other", levels(), TASKS, levels(),
                              trials.known_trials(first, TASKS))
    assert not elsewhere.wanted() and not elsewhere.wanted_styles()
    assert elsewhere.to_json("abc")["methods"] == first and "chosen" in first["ewc"]
