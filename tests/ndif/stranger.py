"""What a stranger is answered at each listening socket: run by the service's Python, without its token.

python tests/ndif/stranger.py 192.0.2.2:40979 ...   prints a line of JSON for each: address -> what was said
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request

import grpc

# One method of each of Ray's servers that would do or tell something.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/ReportOCMetrics",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "/ray.rpc.RayletDriver/ClusterInfo",
)


def of_http(address: str) -> str | None:
    """The status of a GET; None if the server does not speak HTTP/1."""
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with directly.open(f"http://{address}/", timeout=10) as reply:
            return f"HTTP {reply.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except Exception:  # noqa: BLE001  Whatever a server of another protocol makes of it.
        return None


def of_grpc(address: str) -> dict[str, str]:
    """The code of a call of each method that the server has."""
    said = {}
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
            try:
                call(b"", timeout=10)
                said[method] = "OK"
            except grpc.RpcError as error:
                said[method] = error.code().name
    return {method: code for method, code in said.items() if code != "UNIMPLEMENTED"}


if __name__ == "__main__":
    for one in sys.argv[1:]:
        sys.stdout.write(json.dumps({one: of_http(one) or of_grpc(one)}) + "\n")
