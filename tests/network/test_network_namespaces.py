"""Parties in network namespaces of their own: sites only call out, and nobody reaches more than the gateway."""

from __future__ import annotations

import pytest
from federation import STUDY
from parted import ADDRESSES, Parted

from fedsynth.deployment.network import split_address
from fedsynth_client.node.settings import load_settings
from fedsynth_server.coordinator.settings import Study

pytestmark = pytest.mark.network


def test_a_study_runs_while_no_site_can_be_reached(parted: Parted) -> None:
    parted.wait_until(lambda: parted.done() >= 1, 120, "the first round")
    for site in parted.sites:
        settings = load_settings(parted.folder(site))
        own = sorted(split_address(each)[1] for each in (settings.runtime_listen, settings.health_listen))
        first, last = own[0], own[1]
        # The ports are there, for the site itself, and for nobody else.
        assert set(own) <= set(parted.scan(site, "127.0.0.1", first, last))
        assert parted.scan(STUDY, ADDRESSES[site], first, last) == []
    assert parted.scan(STUDY, ADDRESSES["a"], 1, 65535) == []
    assert parted.scan("b", ADDRESSES["a"], 1, 1024) == []


def test_a_site_reaches_the_gateway_and_nothing_else_of_the_coordinator(parted: Parted) -> None:
    _, port = split_address(Study(parted.folder(STUDY)).settings.gateway.address)
    assert parted.scan("a", ADDRESSES[STUDY], 1, 65535) == [port]


def test_all_take_part_until_the_end(parted: Parted) -> None:
    parted.wait_until(lambda: parted.started[STUDY].poll() is not None, 120, "the end of the study")
    assert parted.status().phase == "finished"
    for site in parted.sites:
        assert set(parted.answered(site)) == {("autoencoder", 1), ("radiogenomics", 1), ("gan", 1)}
        assert len(parted.entries(site, "charge")) == 3
