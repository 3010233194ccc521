"""The command `moefleet simulate`."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_errors import told_errors


def simulate(
    trace: Annotated[Path, typer.Option(help="JSON lines: timestamp (ms), input_length, output_length, hash_ids.")],
    members: Annotated[list[int] | None, typer.Option(help="Fleet size; repeat for more.  [default: 16]")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Repeat for more.  [default: all]")] = None,
    utilisation: Annotated[
        float, typer.Option(help="Arrivals are scaled to need this share of the fleet, with the hits that fit in it.")
    ] = 0.8,
    requests: Annotated[int, typer.Option(help="About how many to simulate.")] = 12_000,
    block_size: Annotated[int, typer.Option(help="Prompt tokens that one hash id stands for.")] = 512,
    kv_tokens: Annotated[int, typer.Option(help="Tokens whose KV a member has room for.")] = 4_000_000,
    max_rows: Annotated[int, typer.Option(help="Sequences that run at once in a member.")] = 128,
    step_tokens: Annotated[int, typer.Option(help="Tokens a member computes in one step, at most.")] = 2048,
    base_s: Annotated[float, typer.Option(help="Seconds of a step with nothing in it.")] = 0.008,
    prefill_token_s: Annotated[float, typer.Option(help="Seconds a prompt token adds.")] = 1e-4,
    decode_row_s: Annotated[float, typer.Option(help="Seconds a sequence adds to a step.")] = 1e-4,
    context_token_s: Annotated[float, typer.Option(help="Seconds a token of a sequence's context adds.")] = 2e-8,
    prompt_s: Annotated[float, typer.Option(help="Seconds that a step with prompt tokens in it takes more.")] = 0.0,
    experts_s: Annotated[float, typer.Option(help="Seconds to read the weights of all experts.")] = 0.0,
    expert_share: Annotated[float, typer.Option(help="Of the experts, those that one token is sent to.")] = 0.0,
    ttft_slo_s: Annotated[float, typer.Option(help="A good request has its first token by then.")] = 5.0,
    itl_slo_s: Annotated[float, typer.Option(help="A good request has no more between two tokens, on average.")] = 0.1,
    admission: Annotated[
        bool, typer.Option("--admission", help="Requests wait for their turn at a gateway, and may be refused there.")
    ] = False,
    gateways: Annotated[
        int, typer.Option(help="Requests come to each in turn; it knows of the others' by the members' reports alone.")
    ] = 1,
    max_members: Annotated[
        int | None,
        typer.Option(help="Start members as they are needed, up to so many; the load is a share of what these can do."),
    ] = None,
    start_s: Annotated[float, typer.Option(help="Seconds until a new member is up.")] = 30.0,
    plot: Annotated[Path | None, typer.Option(help="Draw first-token times and goodput into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line a fleet size instead of a table.")] = False,
) -> None:
    """Replay a recorded trace on simulated members, routed as a gateway would and by simpler policies."""
    # The router and what draws: other commands start without them.
    from deploy.simulation_plot import check_plotting, plot_comparisons
    from router.choosers import POLICIES, policy_names
    from router.simulate import SimulateOptions, as_json, compare, table

    with told_errors():
        options = SimulateOptions(
            trace=trace,
            members=tuple(members or (16,)),
            policies=policy_names(policy or POLICIES),
            utilisation=utilisation,
            requests=requests,
            block_size=block_size,
            kv_tokens=kv_tokens,
            max_rows=max_rows,
            step_tokens=step_tokens,
            base_s=base_s,
            prefill_token_s=prefill_token_s,
            decode_row_s=decode_row_s,
            context_token_s=context_token_s,
            prompt_s=prompt_s,
            experts_s=experts_s,
            expert_share=expert_share,
            ttft_slo_s=ttft_slo_s,
            itl_slo_s=itl_slo_s,
            admission=admission,
            gateways=gateways,
            max_members=max_members,
            start_s=start_s,
        )
        if plot is not None:
            check_plotting(plot)
        comparisons = []
        for comparison in compare(options):
            typer.echo(as_json(comparison) if json else table(comparison))
            comparisons.append(comparison)
        if plot is not None:
            plot_comparisons(comparisons, plot)
