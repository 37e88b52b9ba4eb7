//! Machines that need not be here: shipped facts of common cards and hosts, combined by name. Vendor figures
//! are reduced to what streaming kernels reach (see `known/README.md`); only the H200 row is measured.

use super::{Gpu, Host, Machine};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::LazyLock;

#[derive(Deserialize)]
struct Parts {
    gpus: BTreeMap<String, Gpu>,
    hosts: BTreeMap<String, Host>,
}

static PARTS: LazyLock<Parts> =
    LazyLock::new(|| serde_json::from_str(include_str!("known/parts.json")).expect("the shipped facts parse: tested"));

/// Names of the shipped cards and hosts, in alphabetical order.
pub fn known_names() -> (Vec<&'static str>, Vec<&'static str>) {
    let parts = &*PARTS;
    (parts.gpus.keys().map(String::as_str).collect(), parts.hosts.keys().map(String::as_str).collect())
}

/// The machine that `name` spells from shipped parts: any number of cards and one host, joined by `+`
/// (`rtx4070ti-12gb+ddr5-64gb`, `rtx3090+rtx3090+ddr4-64gb`, `ddr5-32gb`). The error names the part that is
/// unknown and what there is.
pub fn known(name: &str) -> Result<Machine, String> {
    let parts = &*PARTS;
    let mut gpus = Vec::new();
    let mut host = None;
    for part in name.split('+') {
        if let Some(gpu) = parts.gpus.get(part) {
            gpus.push(gpu.clone());
        } else if let Some(found) = parts.hosts.get(part) {
            if host.replace(found.clone()).is_some() {
                return Err(format!("machine `{name}` names two hosts; it takes one"));
            }
        } else {
            let (cards, hosts) = known_names();
            return Err(format!(
                "machine `{name}`: no file of that name, and `{part}` is no shipped part. Cards: {}. Hosts: {}. Join with `+`.",
                cards.join(", "),
                hosts.join(", ")
            ));
        }
    }
    let host =
        host.ok_or_else(|| format!("machine `{name}` names no host; add one of: {}", known_names().1.join(", ")))?;
    Ok(Machine { name: name.into(), host, gpus, gpu_note: None })
}
