"""`layerbudget serve` and `layerbudget export`: serve answers here, or with an engine for many users."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from backbone.errors import InputError
from backbone.interrupts import left_to_a_server, safe_place
from layerbudget.options import AllocatorSource, ChatTemplateFile, Device, Keep, ModelSource

SHARE = 0.01  # default of --share


def serve(
    allocator: AllocatorSource,
    upstream: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Engine that serves the full model; without it this process answers."),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN=URL", help="An engine that serves the model of one plan; may be given again."),
    ] = None,
    model: ModelSource = None,
    chat_template: ChatTemplateFile = None,
    keep: Keep = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8100,
    decision_limit_ms: Annotated[
        float, typer.Option(min=1, help="A request that has no plan after this time runs the full model.")
    ] = 500.0,
    max_decision_tokens: Annotated[
        int, typer.Option(min=1, help="A request with more tokens, padding included, runs the full model.")
    ] = 4096,
    max_in_flight: Annotated[
        int, typer.Option(min=1, help="Requests beyond this, or half of it from one sender, are refused with 429.")
    ] = 256,
    max_body_mb: Annotated[float, typer.Option(min=0.01, max=1024, help="Longest body of a request.")] = 4.0,
    client_limit_s: Annotated[
        float, typer.Option(min=0.1, help="Longest time to send a request, and longest pause in reading the answer.")
    ] = 30.0,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest silence of an engine.")] = 600.0,
    stop_limit_s: Annotated[
        float, typer.Option(min=0, help="Time for the requests in flight after SIGTERM or Ctrl-C.")
    ] = 30.0,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", readable=False, help="Keep a share of the prompts for `certify`."),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Probability with which --record keeps a prompt; default: 0.01.")
    ] = None,
    device: Device = None,
) -> None:
    """Answer the OpenAI routes, on this machine alone or in front of an engine that serves many users.

    With --upstream this process chooses the plan of each request, and the engine runs it. The engine is a vLLM with
    layerbudget-vllm, or there is one --pool for each plan (see `layerbudget export`).
    """
    from layerbudget import Allocator, load_backbone
    from serving.local import LocalEngine, make_local_app
    from serving.router.app import make_app
    from serving.router.engines import Upstreams
    from serving.router.limits import Limits
    from serving.router.record import PromptRecord
    from serving.router.selector import RequestSelector, load_probe
    from serving.router.server import allow_connections, make_server, rarely_collect

    limits = Limits(
        in_flight=max_in_flight,
        body_bytes=int(max_body_mb * 2**20),
        client_s=client_limit_s,
        engine_s=timeout_s,
        decision_ms=decision_limit_ms,
        decision_tokens=max_decision_tokens,
        stop_s=stop_limit_s,
    )
    if upstream is None and pool:
        raise typer.BadParameter("--pool needs --upstream, the engine that serves the full model")
    if record is None and share is not None:
        raise InputError("--share needs --record, the file that prompts are kept in")
    kept = None if record is None else PromptRecord(record, SHARE if share is None else share)
    loaded = Allocator.from_pretrained(allocator, chat_template=chat_template, keep=keep)
    if upstream is None:
        network, tokenizer = load_backbone(model or loaded.model_source, device="cpu" if device is None else device)
        loaded.prepare(network)
        app = make_local_app(LocalEngine(loaded, network, tokenizer, kept), limits)
    else:
        upstreams = Upstreams.of(upstream, pool or [], loaded.menu)
        if not (is_checked := upstreams.check()):
            text = f"the engine at {upstreams.engine} does not answer yet; until it does, all run the full plan"
            typer.echo(text, err=True)
        network, tokenizer = load_probe(loaded, model, "auto" if device is None else device)
        app = make_app(RequestSelector(loaded, network, tokenizer, limits, kept), upstreams, is_checked=is_checked)
    allow_connections(limits)
    rarely_collect()
    safe_place()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if kept is not None:
        typer.echo(kept.sentence, err=True)
    typer.echo(f"listening on http://{host}:{port}/v1", err=True)
    with left_to_a_server():
        make_server(app, limits, host, port).run()


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shortened checkpoint; must not exist.")],
    plan: Annotated[str, typer.Option(help="The layers that the checkpoint keeps, such as 0-9,14-17.")],
    allocator: Annotated[
        str | None, typer.Option("--allocator", metavar="DIR", help="Merges its adapter; its model is the default.")
    ] = None,
    model: ModelSource = None,
    device: Device = None,
) -> None:
    """Write the model of one plan as an ordinary, shorter checkpoint that any engine can serve."""
    from layerbudget import Allocator, load_backbone
    from serving.router.export import clear_place, export_plan

    if model is None and allocator is None:
        raise typer.BadParameter("give --model M or --allocator DIR")
    clear_place(out)
    loaded = None if allocator is None else Allocator.from_pretrained(allocator)
    source = model if model is not None or loaded is None else loaded.model_source
    network, tokenizer = load_backbone(str(source), device="cpu" if device is None else device)
    layers = export_plan(network, tokenizer, plan, out, loaded)
    typer.echo(f"{out}: {layers} layers")
