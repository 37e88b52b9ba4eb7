//! The worker pool: one rayon broadcast runs a function on every worker, and inside it the workers meet at
//! barriers and share out the pieces of a stage. Owns the threads and the meeting points; knows nothing of blocks.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Turns that a worker spins before it offers its core to others: about ten microseconds, longer than workers
/// of a stage usually differ, shorter than what a preempted worker would lose.
const SPINS: u32 = 1000;

/// Cores for workers: without them the scheduler may leave two on one core for many milliseconds, in which all others
/// wait for them at every barrier. Elsewhere than on Linux workers run where it puts them.
#[cfg(target_os = "linux")]
mod cores {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    /// The hardware threads of a core each, if this process may use as many cores as there are workers. Fewer workers
    /// stay free, lest two programs meet on the same cores.
    pub fn of_workers(n_workers: usize) -> Vec<CpuSet> {
        let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return Vec::new() };
        let allowed = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
        let siblings = |cpu: usize| {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
        };
        let cores = by_core(allowed.map(|cpu| (cpu, siblings(cpu))));
        if cores.len() == n_workers { cores } else { Vec::new() }
    }

    /// Hardware threads by core: those of one core have the same siblings.
    pub fn by_core(cpus: impl Iterator<Item = (usize, String)>) -> Vec<CpuSet> {
        let mut cores: Vec<(String, CpuSet)> = Vec::new();
        for (cpu, siblings) in cpus {
            let at = cores.iter().position(|(known, _)| *known == siblings).unwrap_or_else(|| {
                cores.push((siblings, CpuSet::new()));
                cores.len() - 1
            });
            let _ = cores[at].1.set(cpu); // of a set, so within the bounds of one
        }
        cores.into_iter().map(|(_, core)| core).collect()
    }

    /// Keeps this thread on `core`; where that is refused, it runs anywhere.
    pub fn stay_on(core: &CpuSet) {
        let _ = sched_setaffinity(Pid::from_raw(0), core);
    }
}

#[cfg(not(target_os = "linux"))]
mod cores {
    pub fn of_workers(_: usize) -> Vec<()> {
        Vec::new()
    }

    pub fn stay_on(_: &()) {}
}

/// Threads that run one function together.
pub(crate) struct Pool {
    threads: ThreadPool,
    /// Two broadcasts at a time could start in different orders on different workers and wait for each other.
    running: Mutex<()>,
}

impl Pool {
    /// A pool of `n_workers` threads, at least 1.
    pub fn new(n_workers: usize) -> Result<Self, ThreadPoolBuildError> {
        let cores = cores::of_workers(n_workers);
        let threads = ThreadPoolBuilder::new()
            .num_threads(n_workers.max(1))
            .thread_name(|i| format!("tandem-cpu-{i}"))
            .start_handler(move |i| cores.get(i).into_iter().for_each(cores::stay_on))
            .build()?;
        Ok(Self { threads, running: Mutex::new(()) })
    }

    /// Number of workers.
    pub fn n_workers(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Runs `f` with rayon's parallel iterators on the workers.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.threads.install(f)
    }

    /// Runs `f` on every worker and returns when all are done. If one panics, the others leave at their next
    /// barrier, and the first panic continues in the caller.
    pub fn run(&self, f: impl Fn(&Worker) + Sync) {
        assert!(self.threads.current_thread_index().is_none(), "a worker cannot start a step");
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let team = Team::new(self.n_workers());
        self.threads.broadcast(|context| {
            let worker = Worker { index: context.index(), team: &team, stage: Cell::new(0) };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(&worker)))
                && !payload.is::<Abandoned>()
            {
                team.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                team.failed.store(true, Ordering::Release);
            }
        });
        if let Some(payload) = team.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

/// Panic payload of a worker that leaves because another one failed.
struct Abandoned;

/// An atomic that shares its cache line with nothing.
#[repr(align(128))]
struct Line(AtomicUsize);

/// What the workers of one run share.
struct Team {
    n_workers: usize,
    /// Workers that wait at the barrier.
    arrived: Line,
    /// Barriers passed.
    passed: Line,
    /// Pieces taken of each worker's share in stage `s`, at `s % 3`: a worker clears its counter of the stage after
    /// the next while nobody uses it.
    taken: [Box<[Line]>; 3],
    failed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Team {
    fn new(n_workers: usize) -> Self {
        let line = || Line(AtomicUsize::new(0));
        let taken = std::array::from_fn(|_| (0..n_workers).map(|_| line()).collect());
        let (failed, panic) = (AtomicBool::new(false), Mutex::new(None));
        Self { n_workers, arrived: line(), passed: line(), taken, failed, panic }
    }
}

/// Pieces of the next run where `left` are left.
fn run_len(left: usize, longest: usize) -> usize {
    left.div_ceil(2).min(longest)
}

/// One thread of a run.
pub(crate) struct Worker<'a> {
    /// Number of this worker, from 0.
    pub index: usize,
    team: &'a Team,
    /// Barriers that this worker has passed.
    stage: Cell<usize>,
}

impl Worker<'_> {
    /// Number of workers of the run.
    pub fn n_workers(&self) -> usize {
        self.team.n_workers
    }

    /// Ends a stage: waits until every worker is here. What any of them wrote before is visible to all after.
    pub fn barrier(&self) {
        self.barrier_while(|_| ());
    }

    /// [`Worker::barrier`]; if others are awaited, `meanwhile` runs first, with whether the wait is over.
    pub fn barrier_while(&self, meanwhile: impl FnOnce(&dyn Fn() -> bool)) {
        let (team, stage) = (self.team, self.stage.get());
        self.stage.set(stage + 1);
        team.taken[(stage + 2) % 3][self.index].0.store(0, Ordering::Relaxed);
        if team.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == team.n_workers {
            team.arrived.0.store(0, Ordering::Relaxed);
            team.passed.0.store(stage + 1, Ordering::Release);
            return;
        }
        let is_over = || team.passed.0.load(Ordering::Acquire) != stage;
        meanwhile(&is_over);
        let mut spins = 0;
        while !is_over() {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                if team.failed.load(Ordering::Acquire) {
                    resume_unwind(Box::new(Abandoned));
                }
                std::thread::yield_now();
            }
        }
    }

    /// Takes runs of the pieces `0..n` of this stage until none is left; each piece goes to one worker: first those of
    /// this worker's share, in order, so that it reads memory from front to back, then what others have not come to,
    /// so that a worker that lost its core delays the others by one run at most. Runs get shorter: each is half of
    /// what is left of a share, and `longest` pieces at most. A stage has one such set.
    pub fn runs(&self, n: usize, longest: usize) -> impl Iterator<Item = Range<usize>> {
        let taken = &self.team.taken[self.stage.get() % 3];
        let mut helped = 0;
        std::iter::from_fn(move || {
            while helped < self.n_workers() {
                let owner = (self.index + helped) % self.n_workers();
                let (share, taken) = (self.share_of(owner, n), &taken[owner].0);
                let end = |first| first + run_len(share.len() - first, longest);
                let take = |first| (first < share.len()).then(|| end(first));
                if let Ok(first) = taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
                    return Some(share.start + first..share.start + end(first));
                }
                helped += 1;
            }
            None
        })
    }

    /// Those of [`Worker::runs`] that this worker takes if it has its share for itself.
    pub fn own_runs(&self, n: usize, longest: usize) -> impl Iterator<Item = Range<usize>> {
        let mut share = self.share(n);
        std::iter::from_fn(move || {
            let first = share.start;
            share.start += run_len(share.len(), longest);
            (first < share.start).then_some(first..share.start)
        })
    }

    /// [`Worker::runs`] of one piece each.
    pub fn pieces(&self, n: usize) -> impl Iterator<Item = usize> {
        self.runs(n, 1).map(|run| run.start)
    }

    /// This worker's share of `0..n`: contiguous, the same for the same worker every time.
    pub fn share(&self, n: usize) -> Range<usize> {
        self.share_of(self.index, n)
    }

    /// [`Worker::share`] of worker number `worker`.
    pub fn share_of(&self, worker: usize, n: usize) -> Range<usize> {
        n * worker / self.n_workers()..n * (worker + 1) / self.n_workers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every piece of every stage is taken once, and a stage sees what the one before it wrote.
    #[test]
    fn stages_are_complete_and_ordered() {
        for n_workers in [1, 2, 5] {
            let pool = Pool::new(n_workers).unwrap();
            let taken: Vec<AtomicUsize> = (0..37).map(|_| AtomicUsize::new(0)).collect();
            pool.run(|w| {
                for stage in 0..200 {
                    for run in w.runs(taken.len(), 1 + stage % 8) {
                        assert!(!run.is_empty() && run.len() <= 1 + stage % 8);
                        run.for_each(|piece| assert_eq!(taken[piece].fetch_add(1, Ordering::Relaxed), stage));
                    }
                    w.barrier();
                    assert!(taken.iter().all(|t| t.load(Ordering::Relaxed) > stage));
                }
            });
            assert!(taken.iter().all(|t| t.load(Ordering::Relaxed) == 200));
        }
    }

    /// A worker that nobody helps takes its own runs: halves of what is left, within the bound.
    #[test]
    fn runs_get_shorter() {
        Pool::new(1).unwrap().run(|w| {
            assert!(w.own_runs(37, 16).map(|run| run.len()).eq([16, 11, 5, 3, 1, 1]));
            assert!(w.own_runs(37, 16).eq(w.runs(37, 16)));
        });
        Pool::new(3).unwrap().run(|w| assert!(w.own_runs(37, 16).flatten().eq(w.share(37))));
    }

    /// Two cores of two hardware threads, and one of which only one may be used: a worker may use both of its core.
    #[cfg(target_os = "linux")]
    #[test]
    fn hardware_threads_belong_to_cores() {
        let cpus = [(0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5"), (6, "2,6")];
        let cores = cores::by_core(cpus.into_iter().map(|(cpu, siblings)| (cpu, siblings.to_owned())));
        let of = |core: &nix::sched::CpuSet| (0..8).filter(|cpu| core.is_set(*cpu).unwrap()).collect::<Vec<_>>();
        assert_eq!(cores.iter().map(of).collect::<Vec<_>>(), [vec![0, 4], vec![1, 5], vec![6]]);
        assert!(cores::of_workers(nix::sched::CpuSet::count() + 1).is_empty(), "more workers than cores stay free");
    }

    /// Shares cover everything once.
    #[test]
    fn shares_partition() {
        let pool = Pool::new(3).unwrap();
        let seen: Vec<AtomicUsize> = (0..10).map(|_| AtomicUsize::new(0)).collect();
        pool.run(|w| {
            for i in w.share(10) {
                seen[i].fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
    }

    /// A panic on one worker reaches the caller with its message, and the pool still works afterwards.
    #[test]
    fn panics_do_not_hang() {
        let pool = Pool::new(3).unwrap();
        // Between barriers, and while others are awaited.
        for meanwhile in [false, true] {
            let failed = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|w| {
                    w.barrier();
                    if w.index == 1 && !meanwhile {
                        panic!("broken on purpose");
                    }
                    w.barrier_while(|_| assert!(!meanwhile, "broken on purpose"));
                    w.barrier();
                });
            }));
            let payload = failed.unwrap_err();
            assert_eq!(payload.downcast_ref::<&str>(), Some(&"broken on purpose"), "meanwhile: {meanwhile}");
        }
        let count = AtomicUsize::new(0);
        pool.run(|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 3);
    }
}
