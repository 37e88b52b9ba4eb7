//! The times of one decode step of a GPU and the CPU workers, brought onto one axis: what each did, and what the
//! hand-overs between them cost. Only arithmetic on times that the step itself has kept.

use tandem_cuda::handoff::Times;

/// What a side did for a while.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Names of the blocks.
    pub name: String,
    /// What it was.
    pub what: Activity,
    /// Microseconds after the GPU's first kernel.
    pub start: f64,
    /// As `start`.
    pub end: f64,
}

impl Span {
    fn micros(&self) -> f64 {
        self.end - self.start
    }
}

/// What a [`Span`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Blocks that nothing else runs beside.
    Alone,
    /// A share of a block, or blocks of one side, while the other side has work too.
    Share,
    /// The workers read weights of what comes next while the GPU is alone.
    Ahead,
    /// Copies between the sides.
    HandOver,
    /// Nothing to do before the other side answers.
    Wait,
}

/// One decode step of both sides.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTrace {
    /// The GPU's lane, without gaps.
    pub gpu: Vec<Span>,
    /// The lane of the CPU workers: what they served, and what they read ahead between.
    pub cpu: Vec<Span>,
    /// Microseconds from the GPU's first kernel to its last.
    pub step: f64,
    /// What each hand-over cost beside the work of both sides, microseconds.
    pub handoffs: Vec<f64>,
    /// The two clocks agree within so many microseconds.
    pub clock_error: f64,
}

/// Microseconds that a hand-over took beyond the longer of what the two sides did meanwhile: copies, flags and the way
/// from the flag to the workers. No clock is compared with the other.
pub fn handoff_cost(t: &Times) -> f64 {
    let micros = |from: u64, to: u64| to.saturating_sub(from) as f64 * 1e-3;
    (micros(t.begun, t.taken) - micros(t.seen, t.answered).max(micros(t.given, t.waits))).max(0.0)
}

impl StepTrace {
    /// From the hand-overs of a step that began at `started` and took `nanoseconds`, both by the GPU's clock; `None`:
    /// it ends with the answer to the last of them, which the GPU does not wait for. `alone` `[n + 1]` are the names of
    /// the blocks that the GPU runs before each hand-over and at the end, `shared` `[n]` that of the block of which it
    /// has a share meanwhile (empty: none), `served` `[n]` what the workers run.
    pub fn new(
        times: &[Times],
        started: u64,
        nanoseconds: Option<u64>,
        alone: &[String],
        shared: &[String],
        served: &[String],
    ) -> Self {
        assert!(alone.len() == times.len() + 1 && shared.len() == times.len() && served.len() == times.len());
        // An input is seen after it is given, and the GPU goes on after the answer: that bounds how far the clocks
        // are apart (CPU's minus GPU's) from both sides.
        let apart = |cpu: u64, gpu: u64| i128::from(cpu) - i128::from(gpu);
        let most = times.iter().map(|t| apart(t.seen, t.given)).min().unwrap_or(0);
        let taken = &times[..times.len() - usize::from(nanoseconds.is_none() && !times.is_empty())];
        let least = taken.iter().map(|t| apart(t.answered, t.goes_on)).max().unwrap_or(most);
        let offset = (most + least) / 2;
        let gpu_us = |t: u64| (i128::from(t) - i128::from(started)) as f64 * 1e-3;
        let cpu_us = |t: u64| (i128::from(t) - offset - i128::from(started)) as f64 * 1e-3;
        let (mut gpu, mut cpu, mut at) = (Vec::new(), Vec::new(), 0.0);
        let mut push = |lane: &mut Vec<Span>, name: &str, what, end: f64| {
            if end > at {
                lane.push(Span { name: name.into(), what, start: at, end });
                at = end;
            }
        };
        for (i, t) in times.iter().enumerate() {
            push(&mut gpu, &alone[i], Activity::Alone, gpu_us(t.begun));
            push(&mut gpu, "to the CPU", Activity::HandOver, gpu_us(t.given));
            if !shared[i].is_empty() {
                push(&mut gpu, &shared[i], Activity::Share, gpu_us(t.waits));
            }
            let (start, end) = (cpu_us(t.seen), cpu_us(t.answered));
            if t.asked > t.ahead {
                let (name, end) = (format!("{}, reading ahead", served[i]), cpu_us(t.asked));
                cpu.push(Span { name, what: Activity::Ahead, start: cpu_us(t.ahead), end });
            }
            if i < taken.len() {
                push(&mut gpu, "waits for the CPU", Activity::Wait, gpu_us(t.goes_on));
                push(&mut gpu, "from the CPU", Activity::HandOver, gpu_us(t.taken));
            } else {
                push(&mut gpu, "waits for the CPU", Activity::Wait, end);
            }
            cpu.push(Span { name: served[i].clone(), what: Activity::Share, start, end });
        }
        let step = nanoseconds.map(|n| n as f64 * 1e-3).or(gpu.last().map(|s| s.end)).unwrap_or(0.0);
        push(&mut gpu, &alone[times.len()], Activity::Alone, step);
        let handoffs = taken.iter().map(handoff_cost).collect();
        Self { gpu, cpu, step, handoffs, clock_error: (most - least).unsigned_abs() as f64 / 2e3 }
    }

    /// Microseconds that the GPU computed.
    pub fn gpu_busy(&self) -> f64 {
        let computes = |s: &&Span| matches!(s.what, Activity::Alone | Activity::Share);
        self.gpu.iter().filter(computes).map(Span::micros).sum()
    }

    /// Microseconds that the CPU workers were at work: computing, or reading ahead (of which a part was for experts
    /// that were not chosen).
    pub fn cpu_busy(&self) -> f64 {
        self.cpu.iter().map(Span::micros).sum()
    }

    /// Of [`StepTrace::cpu_busy`], microseconds of reading ahead.
    pub fn ahead(&self) -> f64 {
        self.cpu.iter().filter(|s| s.what == Activity::Ahead).fold(0.0, |sum, s| sum + s.micros())
    }

    /// Microseconds of the longer of the two parts, if nothing of one waited for the other, and of the hand-overs.
    pub fn longer_part(&self) -> f64 {
        self.gpu_busy().max(self.cpu_busy()) + self.handoffs.iter().sum::<f64>()
    }

    /// The same block by block, in the order in which they depend on each other: what the GPU runs alone, then at each
    /// hand-over the longer of the two shares, and `handoff` microseconds.
    pub fn longest_path(&self, handoff: f64) -> f64 {
        let micros = |what: Activity| self.gpu.iter().filter(move |s| s.what == what).map(Span::micros);
        let alone: f64 = micros(Activity::Alone).sum();
        let shares: f64 = self
            .cpu
            .iter()
            .filter(|cpu| cpu.what == Activity::Share)
            .map(|cpu| {
                let same = |s: &&Span| s.what == Activity::Share && s.name == cpu.name;
                self.gpu.iter().find(same).map_or(0.0, Span::micros).max(cpu.micros())
            })
            .sum();
        alone + shares + handoff * self.handoffs.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of two hand-overs on a GPU whose clock is 1 ms ahead: the spans lie where they were, the GPU's without
    /// gaps, and what a hand-over cost does not depend on the clocks.
    #[test]
    fn spans_of_both_clocks_lie_on_one_axis() {
        let gpu = 5_000_000;
        let cpu = gpu - 1_000_000;
        let times = |at: u64| Times {
            begun: gpu + at,
            given: gpu + at + 2_000,
            waits: gpu + at + 10_000,
            goes_on: gpu + at + 56_000,
            taken: gpu + at + 58_000,
            ahead: cpu + at - 10_000,
            asked: cpu + at,
            seen: cpu + at + 4_000,
            answered: cpu + at + 54_000,
        };
        let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let trace = StepTrace::new(
            &[times(20_000), times(100_000)],
            gpu,
            Some(170_000),
            &names(&["blk.0.attn", "blk.1.attn", "head"]),
            &names(&["blk.0.ffn", "blk.1.ffn"]),
            &names(&["blk.0.ffn", "blk.1.ffn"]),
        );
        assert_eq!(trace.clock_error, 2.0);
        assert!(trace.gpu.windows(2).all(|w| w[0].end == w[1].start));
        assert_eq!((trace.gpu[0].start, trace.gpu.last().unwrap().end), (0.0, 170.0));
        let cpu: Vec<_> = trace.cpu.iter().map(|s| (s.what, s.start, s.end)).collect();
        let share = |start, end| (Activity::Share, start, end);
        let ahead = |start, end| (Activity::Ahead, start, end);
        assert_eq!(cpu, [ahead(10.0, 20.0), share(24.0, 74.0), ahead(90.0, 100.0), share(104.0, 154.0)]);
        assert_eq!(trace.handoffs, [8.0, 8.0]);
        assert_eq!((trace.gpu_busy(), trace.cpu_busy()), (20.0 + 22.0 + 12.0 + 16.0, 120.0));
        assert_eq!((trace.ahead(), trace.longer_part()), (20.0, 136.0));
        assert_eq!(trace.longest_path(8.0), 170.0);
    }

    /// Where the CPU has the head, the step ends with its answer.
    #[test]
    fn a_step_may_end_on_the_cpu() {
        let first = Times {
            begun: 10,
            given: 1_010,
            waits: 1_010,
            goes_on: 9_010,
            taken: 10_010,
            ahead: 10,
            asked: 10,
            seen: 2_010,
            answered: 8_010,
        };
        let last =
            Times { begun: 20_010, given: 21_010, ahead: 8_510, asked: 8_510, seen: 22_010, answered: 52_010, ..first };
        let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let (alone, served) = (names(&["blk.0.attn", "blk.1.attn", ""]), names(&["blk.0.ffn", "blk.1.ffn, head"]));
        let trace = StepTrace::new(&[first, last], 10, None, &alone, &names(&["", ""]), &served);
        assert_eq!((trace.step, trace.clock_error, trace.handoffs.len()), (52.0, 1.0, 1));
        assert_eq!(trace.gpu.last().map(|s| (s.what, s.start, s.end)), Some((Activity::Wait, 21.0, 52.0)));
    }
}
