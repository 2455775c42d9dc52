"""`make demo`: the whole loop on a real Kubernetes; ends with two tables, a figure and `build/demo/report.json`."""

import json
import os
import signal
import sys
from pathlib import Path

import click
from rich.console import Console

from demo import report
from demo.job import Job, Settings
from kvserve_api.errors import KVServeError
from testcluster.errors import ClusterError, UnavailableHereError

ROOT = Path(__file__).resolve().parents[3]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build" / "demo")
@click.option("--fast-mbit", default=1000, show_default=True, help="The link's normal bandwidth.")
@click.option("--slow-mbit", default=50, show_default=True, help="Its bandwidth when it drops.")
@click.option("--max-tokens", default=16, show_default=True, help="Tokens generated a request.")
@click.option(
    "--otlp-endpoint", default="", help="Send traces and metrics there, as pods reach it."
)
def main(out: Path, fast_mbit: int, slow_mbit: int, max_tokens: int, otlp_endpoint: str) -> None:
    """Run KVServe's main job from `kubectl apply` to compressed transfers between two vLLM pods."""
    # a terminated demo tears its cluster down like an interrupted one
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console = Console(width=None if sys.stdout.isatty() else 120)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        root=ROOT,
        out=out,
        fast_mbit=fast_mbit,
        slow_mbit=slow_mbit,
        max_tokens=max_tokens,
        otlp_endpoint=otlp_endpoint,
    )
    try:
        result = Job(settings, console).run()
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted; the cluster is down. Logs: {out / 'logs'}")
        sys.exit(130)
    except UnavailableHereError as error:
        console.print(f"[red]the demo can't run here:[/] {error}", highlight=False)
        console.print(
            "To use a cluster you have: KUBECONFIG=… KVSERVE_EXISTING_CLUSTER=1 make demo"
        )
        sys.exit(1)
    except (KVServeError, ClusterError, RuntimeError, TimeoutError) as error:
        console.print(f"[red]the demo failed:[/] {error}", highlight=False)
        console.print(f"the cluster is down. Logs: {out / 'logs'}")
        sys.exit(1)
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    report.figure(result, out / "demo.png")
    for table in report.tables(result):
        console.print(table)
    for line in report.reasons(result):
        console.print(line, highlight=False)
    console.print(
        f"At {slow_mbit} Mbit/s, against raw: completion {result['speedup_jct']}× and first token"
        f" {result['speedup_ttft']}× as fast; text agreement {result['text_agreement']:.0%}.\n"
        f"Within the quality budget the cache shrinks {result['best_ratio']:.1f}×, without calibration"
        f" {result['best_ratio_uncalibrated']:.1f}×.\n"
        f"Report: {os.path.relpath(out / 'report.json')}, figure: {os.path.relpath(out / 'demo.png')}"
    )


if __name__ == "__main__":
    main()
