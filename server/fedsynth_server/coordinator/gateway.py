"""The gateway: an nginx that lets registered sites reach SuperLink's Fleet API, and nobody anything else.

SuperLink serves the Fleet API beside two others on one port: whoever reaches its Control API can start runs at every
hospital, whoever reaches its Runtime API can take tasks. Flower's node authentication protects the Fleet API only.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

from fedsynth.errors import JobFailed, UsageError
from fedsynth.files import write_atomic
from fedsynth_server.coordinator.settings import Study, checked_address

# Names of Flower's Fleet calls are words and dashes. What is asked must look like this before and after nginx has
# normalised it, so that nothing (.., %2e, //, ;) means one thing here and another at SuperLink.
_FLEET = r"^/v1/fleet/[a-z][a-z-]*$"

_TEMPLATE = """\
# The public door of a fedsynth study: POST /v1/fleet/... (signed by registered sites) and GET /health; nothing else.
# Written by `fedsynth study`; changes are lost at the next start.
daemon off;
{user}worker_processes 2;
pid "{run}/nginx.pid";
error_log stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    server_tokens off;
    default_type text/plain;

    # Who asked for what, when, with which outcome and how many bytes: no query, no header, no body. What a node says every
    # few seconds is left out while it succeeds.
    log_format calls '$time_iso8601 $remote_addr $request_method $uri $status '
                     'in=$request_length out=$bytes_sent seconds=$request_time';
    map "$uri $status" $worth_a_line {{
        default 1;
        "/v1/fleet/pull-messages 200" 0;
        "/v1/fleet/send-node-heartbeat 200" 0;
        "/health 200" 0;
    }}
    access_log {access_log} calls if=$worth_a_line;

    client_body_temp_path "{run}/nginx-body";
    proxy_temp_path "{run}/nginx-proxy";
    fastcgi_temp_path "{run}/nginx-fastcgi";
    uwsgi_temp_path "{run}/nginx-uwsgi";
    scgi_temp_path "{run}/nginx-scgi";

    limit_req_zone $binary_remote_addr zone=calls:4m rate=200r/s;
    limit_conn_zone $binary_remote_addr zone=connections:4m;

    upstream superlink {{
        server {superlink};
        keepalive 16;
    }}

    server {{
        listen {listen} ssl;
        server_name _;

        ssl_certificate "{certificate}";
        ssl_certificate_key "{key}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_session_cache shared:tls:4m;
        ssl_session_tickets off;

        client_max_body_size {max_request_mib}m;
        client_body_buffer_size 6m;  # a chunk stays in memory
        client_header_timeout 15s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;
        limit_req zone=calls burst=400 nodelay;
        limit_conn connections 64;

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host localhost;
        # What a client says of where it comes from is nobody's word.
        proxy_set_header Forwarded "";
        proxy_set_header X-Forwarded-For "";
        proxy_set_header X-Forwarded-Proto "";
        proxy_ssl_verify on;
        proxy_ssl_verify_depth 2;
        proxy_ssl_trusted_certificate "{ca}";
        proxy_ssl_server_name on;
        proxy_ssl_name localhost;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_connect_timeout 5s;
        proxy_send_timeout 60s;
        proxy_read_timeout 60s;
        proxy_max_temp_file_size 0;
        proxy_next_upstream off;

        location /v1/fleet/ {{
            if ($request_method != POST) {{ return 404; }}
            if ($uri !~ "{fleet}") {{ return 404; }}
            if ($request_uri !~ "{fleet}") {{ return 404; }}
            proxy_pass https://superlink;
        }}
        location = /v1/fleet {{  # nginx would answer with a redirect
            return 404;
        }}
        location = /health {{
            if ($request_method !~ "^(GET|HEAD)$") {{ return 404; }}
            if ($request_uri != "/health") {{ return 404; }}
            proxy_pass https://superlink;
        }}
        location / {{
            return 404;
        }}
    }}
}}
"""


def render(study: Study, *, elsewhere: Path | None = None, superlink: str | None = None) -> str:
    """The nginx configuration.

    Args:
        study: the study.
        elsewhere: for a gateway that runs elsewhere, the folder there that holds ``keys/`` and ``run/``.
        superlink: for a gateway that runs elsewhere, host:port of SuperLink as seen from there.

    Raises:
        UsageError: ``address_invalid``; of the settings.
    """
    settings = study.settings
    base = elsewhere if elsewhere is not None else study.folder.absolute()
    address = checked_address(superlink if superlink is not None else study.superlink_address)
    for path in (base, base / settings.gateway.certificate):
        if set(str(path)) & set('"$\\\n'):
            raise UsageError("path_unsuitable", f"nginx cannot be told of {path}.", "Choose a folder of plain letters.")
    # Started as root, nginx would give its workers to a user who cannot read this folder.
    root = elsewhere is None and os.geteuid() == 0
    return _TEMPLATE.format(
        user=f"user {getpass.getuser()};\n" if root else "",
        run=base / "run",
        # The supervisor keeps what a gateway that is started here prints, in logs/gateway.log.
        access_log="/dev/stdout" if elsewhere is None else f'"{base}/logs/gateway.log"',
        superlink=address,
        listen=settings.gateway.listen,
        certificate=base / settings.gateway.certificate,
        key=base / settings.gateway.key,
        ca=base / settings.superlink.ca,
        max_request_mib=settings.gateway.max_request_mib,
        fleet=_FLEET,
    )


def write_configuration(study: Study) -> Path:
    """Write ``run/nginx.conf``; returns its path."""
    path = (study.folder / "run" / "nginx.conf").absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, render(study).encode())
    return path


def program(study: Study) -> str:
    """Path of nginx.

    Raises:
        UsageError: ``nginx_missing``.
    """
    found = shutil.which(study.settings.gateway.nginx)
    if found is None:
        raise UsageError(
            "nginx_missing",
            f"There is no program {study.settings.gateway.nginx!r}.",
            "Install nginx, name it in coordinator.toml ([gateway] nginx), or run the gateway elsewhere (managed = false).",
        )
    return found


def command(study: Study, configuration: Path) -> list[str]:
    """The command that runs the gateway in the foreground."""
    return [program(study), "-e", "stderr", "-p", str(study.folder.absolute()), "-c", str(configuration)]


def check_configuration(study: Study, configuration: Path) -> None:
    """Let nginx check a configuration and the keys that it names.

    Raises:
        JobFailed: ``gateway_config_invalid``, with what nginx says.
    """
    tried = subprocess.run([*command(study, configuration), "-t", "-q"], capture_output=True, text=True, timeout=30)
    if tried.returncode != 0:
        said = " ".join(tried.stderr.split())
        raise JobFailed(
            "gateway_config_invalid", f"nginx does not take the configuration: {said}", "Mend the file that it names."
        )
