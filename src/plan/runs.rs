//! How a plan is walked: the model cut into runs of consecutive blocks, each on the CPU alone or around one GPU, and
//! within the latter the tasks of the CPU workers between the GPU's blocks. A pure function of the places.

use super::{Device, Place};
use std::ops::Range;
use tandem_cpu::handoff::Task;
use tandem_cuda::HostTask;

/// Consecutive blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Run {
    /// Blocks of the model, on the CPU.
    Cpu(Range<usize>),
    /// Around one GPU.
    Gpu {
        /// Which of [`Runs::gpus`].
        gpu: usize,
        /// Indices among the blocks of the GPU.
        local: Range<usize>,
        /// What the CPU workers do meanwhile, by block of the model.
        tasks: Vec<Task>,
    },
}

/// The runs of a placement.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    /// In the order of the model.
    pub runs: Vec<Run>,
    /// The GPUs in use, ascending, and the tasks of the CPU workers between the blocks of each.
    pub gpus: Vec<(Device, Vec<HostTask>)>,
}

impl Runs {
    /// The runs of `places`.
    pub fn new(places: &[Place]) -> Self {
        let mut devices: Vec<Device> =
            places.iter().flatten().map(|s| s.device).filter(|d| *d != Device::Cpu).collect();
        devices.sort();
        devices.dedup();
        let mut n_local = vec![0; devices.len()];
        let mut of = Self { runs: Vec::new(), gpus: devices.into_iter().map(|d| (d, Vec::new())).collect() };
        // Blocks on the CPU that belong to no run yet.
        let mut pending = 0..0;
        for (i, place) in places.iter().enumerate() {
            let home = place[0].device;
            if home == Device::Cpu {
                pending = if pending.is_empty() { i..i + 1 } else { pending.start..i + 1 };
                continue;
            }
            let gpu = of.gpus.iter().position(|(d, _)| *d == home).expect("a device of the places");
            let at = n_local[gpu];
            n_local[gpu] += 1;
            if !matches!(of.runs.last(), Some(Run::Gpu { gpu: last, .. }) if *last == gpu) {
                if !pending.is_empty() && of.gpus.len() > 1 {
                    of.runs.push(Run::Cpu(std::mem::take(&mut pending)));
                }
                of.runs.push(Run::Gpu { gpu, local: at..at, tasks: Vec::new() });
            }
            let Some(Run::Gpu { local, tasks, .. }) = of.runs.last_mut() else { unreachable!("pushed above") };
            local.end = at + 1;
            let host_tasks = &mut of.gpus[gpu].1;
            if !pending.is_empty() {
                let blocks = std::mem::take(&mut pending);
                host_tasks.push(HostTask { at, is_share: false, gives: blocks.start > 0, takes: true });
                tasks.push(Task { blocks, is_share: false });
            }
            if place.len() > 1 {
                host_tasks.push(HostTask { at, is_share: true, gives: true, takes: true });
                tasks.push(Task { blocks: i..i + 1, is_share: true });
            }
        }
        match (&mut of.runs[..], pending.is_empty()) {
            (_, true) => {}
            ([Run::Gpu { local, tasks, .. }], false) => {
                let takes = pending.end < places.len();
                of.gpus[0].1.push(HostTask { at: local.end, is_share: false, gives: true, takes });
                tasks.push(Task { blocks: pending, is_share: false });
            }
            _ => of.runs.push(Run::Cpu(pending)),
        }
        of
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Share;

    /// Places from text: a letter a block, `c` CPU, `0` and `1` GPUs, `s` shared between GPU 0 and the CPU.
    fn places(text: &str) -> Vec<Place> {
        let whole = |device| vec![Share { device, part: 0..1 }];
        let shared = || vec![Share { device: Device::Cuda(0), part: 0..1 }, Share { device: Device::Cpu, part: 1..2 }];
        let place = |c| match c {
            'c' => whole(Device::Cpu),
            '0' => whole(Device::Cuda(0)),
            '1' => whole(Device::Cuda(1)),
            _ => shared(),
        };
        text.chars().map(place).collect()
    }

    #[test]
    fn one_gpu_takes_everything_into_its_run() {
        let runs = Runs::new(&places("c0sccs0c"));
        let task = |blocks: Range<usize>, is_share| Task { blocks, is_share };
        let tasks = vec![task(0..1, false), task(2..3, true), task(3..5, false), task(5..6, true), task(7..8, false)];
        assert_eq!(runs.runs, [Run::Gpu { gpu: 0, local: 0..4, tasks }]);
        let host = |at, is_share, gives, takes| HostTask { at, is_share, gives, takes };
        let host_tasks = vec![
            host(0, false, false, true),
            host(1, true, true, true),
            host(2, false, true, true),
            host(2, true, true, true),
            host(4, false, true, false),
        ];
        assert_eq!(runs.gpus, [(Device::Cuda(0), host_tasks)]);
    }

    #[test]
    fn several_gpus_meet_on_the_host() {
        let runs = Runs::new(&places("c0c01c1c")).runs;
        let inner = |blocks| vec![Task { blocks, is_share: false }];
        let expected = [
            Run::Cpu(0..1),
            Run::Gpu { gpu: 0, local: 0..2, tasks: inner(2..3) },
            Run::Gpu { gpu: 1, local: 0..2, tasks: inner(5..6) },
            Run::Cpu(7..8),
        ];
        assert_eq!(runs, expected);
        assert_eq!(Runs::new(&places("cc")).runs, [Run::Cpu(0..2)]);
    }
}
