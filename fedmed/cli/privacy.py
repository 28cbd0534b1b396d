"""`fedmed privacy`: what a privacy budget buys, before anything runs."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.privacy.planning import CentralPlan, Plan

BAR = 32  # characters

app = typer.Typer(help="Plan a privacy budget.", no_args_is_help=True)


class Unit(enum.StrEnum):
    """What is sampled and clipped."""

    patient = "patient"
    image = "image"


@app.callback()
def privacy() -> None:
    """Plan a privacy budget."""


@app.command("plan")
def plan(
    epsilon: Annotated[float, typer.Option(metavar="E", help="the budget ε")],
    rounds: Annotated[int, typer.Option(metavar="R", help="rounds of the federation")],
    patients: Annotated[int, typer.Option(metavar="N", help="patients at the site; public")] = 0,
    delta: Annotated[float | None, typer.Option(metavar="D", help="δ; else 1e-6, or 1/(10 N) if that is less")] = None,
    batch_size: Annotated[int, typer.Option(metavar="B", help="expected patients (or images) in a step")] = 16,
    local_steps: Annotated[int, typer.Option(metavar="S", help="steps a round; 0 = one pass over the data")] = 0,
    unit: Annotated[Unit, typer.Option(help="what is sampled and clipped; ε is the patient's in both cases")] = (
        Unit.patient
    ),
    images_per_patient: Annotated[int, typer.Option(metavar="K", help="--unit image: the most that one has")] = 1,
    central: Annotated[bool, typer.Option("--central", help="noise at the server; the hospital is the unit")] = False,
    sites: Annotated[int, typer.Option(metavar="K", help="--central: hospitals")] = 0,
    parameters: Annotated[
        int | None, typer.Option(metavar="P", help="--central: trained values of the network; else CheXNet's")
    ] = None,
    clip: Annotated[float, typer.Option(metavar="C", help="--central: largest norm of a hospital's change")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a program")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="also draw ε over rounds: .html or .svg")] = None,
) -> None:
    """Say how much noise keeps a budget, and what every round spends of it.

    Nothing is trained and no data is read. With --central, a plan whose noise would drown all learning is refused.

    Example: fedmed privacy plan --patients 1000 --epsilon 8 --rounds 10 --batch-size 32
    """
    from fedmed.errors import ConfigError
    from fedmed.privacy.planning import CHEXNET_PARAMETERS, plan_central, plan_training
    from fedmed.reporting.budget import check_plot_name

    if plot is not None:
        check_plot_name(plot)
    for given, name, wanted in (
        (sites and not central, "--sites", "--central"),
        (patients and central, "--patients", "a plan without --central"),
        (images_per_patient != 1 and unit is Unit.patient, "--images-per-patient", "--unit image"),
    ):
        if given:
            raise ConfigError(f"{name} is for {wanted}")
    if not (sites if central else patients):
        raise ConfigError("--sites is missing: how many hospitals take part" if central else "--patients is missing")
    if central:
        noise_at_server = plan_central(
            sites=sites,
            epsilon=epsilon,
            rounds=rounds,
            parameters=CHEXNET_PARAMETERS if parameters is None else parameters,
            clip=clip,
            delta=delta,
        )
        made = noise_at_server.plan
    else:
        noise_at_server = None
        made = plan_training(
            patients=patients,
            epsilon=epsilon,
            rounds=rounds,
            batch_size=batch_size,
            steps_per_round=local_steps,
            delta=delta,
            unit=unit.value,
            images_per_patient=images_per_patient,
        )
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(_facts(made, noise_at_server)))
    else:
        _show(made, noise_at_server, batch_size)
    if plot is not None:
        _draw(made, plot)
    if noise_at_server is not None and noise_at_server.refusal:
        raise ConfigError(noise_at_server.refusal)


def _facts(made: Plan, central: CentralPlan | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "unit": made.unit,
        "budget": made.epsilon,
        "delta": made.delta,
        "noise_multiplier": made.noise_multiplier,
        "sample_rate": made.sample_rate,
        "steps_per_round": made.steps_per_round,
        "steps": made.steps,
        "rounds": [
            {
                "round": row.round,
                "steps": row.steps,
                "epsilon": row.epsilon,
                "accountant": row.accountant,
                "epsilon_rdp": row.epsilon_rdp,
            }
            for row in made.schedule
        ],
        "warnings": list(made.warnings),
    }
    if central is not None:
        facts["central"] = {
            "sites": central.sites,
            "parameters": central.parameters,
            "clip": central.clip,
            "noise_per_value": central.noise_per_value,
            "noise_norm": central.noise_norm,
            "noise_to_clip": central.noise_to_clip,
            "trains": central.trains,
        }
    return facts


def _show(made: Plan, central: CentralPlan | None, batch_size: int) -> None:
    from fedmed.types import rounded_up  # numpy

    print(f"noise multiplier  σ = {rounded_up(made.noise_multiplier, 4)}, for ε {made.epsilon:g} at δ {made.delta:.1e}")
    if central is None:
        print(f"sample rate       q = {made.sample_rate:.5g}, {batch_size} {made.unit}s expected in a step")
        print(f"steps             {made.steps_per_round} a round, {made.steps} in all")
        print("neighbours        differ in one patient, with all images")
    else:
        print(f"neighbours        differ in one of {central.sites} hospitals, each charged for every round")
        print(f"clip              {central.clip:g}, the longest change of a hospital")
        print(
            f"noise             {central.noise_norm:,.4g} long, {central.noise_to_clip:,.4g} × the clip, "
            f"over {central.parameters:,} parameters"
        )
    print()
    print(f"{'round':>6} {'steps':>8} {'ε':>9} {'ε by RDP':>9}")
    most = max(row.epsilon_rdp for row in made.schedule) or 1.0  # so much noise that no ε can be told from 0
    for row in made.schedule:
        tight, loose = (round(BAR * value / most) for value in (row.epsilon, row.epsilon_rdp))
        print(
            f"{row.round:>6} {row.steps:>8} {rounded_up(row.epsilon, 3):>9} {rounded_up(row.epsilon_rdp, 3):>9}  "
            f"{'█' * tight}{'░' * (loose - tight)}{' (RDP)' if row.accountant == 'rdp' else ''}"
        )
    if central is None:
        alone = made.schedule[-1].epsilon_rdp >= made.epsilon
        then = "nothing may follow it" if alone else "what may follow it is decided by RDP"
        print(f"\nA site that allows ε = {made.epsilon:g} takes this as its patients' first private run; {then}.")


def _draw(made: Plan, path: Path) -> None:
    from fedmed.reporting.budget import BudgetCurve, write_budget_plot
    from fedmed.types import rounded_up

    whose = "hospital" if made.unit == "site" else "patient"
    title = f"ε per {whose}: σ {rounded_up(made.noise_multiplier, 4)}, δ {made.delta:.1e}"
    curve = BudgetCurve(
        title=title,
        rounds=[row.round for row in made.schedule],
        epsilon=[row.epsilon for row in made.schedule],
        epsilon_rdp=[row.epsilon_rdp for row in made.schedule],
        budget=made.epsilon,
    )
    write_budget_plot(path, curve)
    print(f"wrote {path}", file=sys.stderr)
