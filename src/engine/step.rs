//! One step: the blocks of the model, in order, each on the device where the plan put it. Where the CPU has a part in
//! what a GPU does, both work at the same time: the GPU's launches are queued, the workers serve its hand-overs.

use super::experts::{ExpertUses, Experts, Layer};
use super::{Error, StepTrace};
use crate::plan::{Device, Plan, Pool, Run, Runs};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tandem_cpu::handoff::{Handoff, Memory, Task};
use tandem_cpu::{Floats, Isa, StateSize};
use tandem_cuda::backend::BEGUN_BYTES;
use tandem_cuda::experts::HostExperts;
use tandem_cuda::handoff::Times;
use tandem_cuda::{Feed, HostShare, Streamed};
use tandem_spec::{Batch, Block, Model, SamplerOptions, Sequence, StateBytes, TensorSource};

/// How the devices of a plan are used.
pub struct DeviceOptions {
    /// Instruction set of the CPU kernels.
    pub isa: Isa,
    /// Folder with NVRTC, where it is not on the system's path.
    pub cuda_libs: Option<PathBuf>,
    /// Folder where compiled kernels are kept; `None`: nowhere.
    pub cubin_cache: Option<PathBuf>,
}

/// A loaded model: the plan and, per device, the weights of its blocks.
pub struct Engine {
    model: Model,
    plan: Plan,
    cpu: Option<tandem_cpu::Backend>,
    gpus: Vec<(Device, tandem_cuda::Backend)>,
    runs: Vec<Run>,
    /// Which experts lie on the GPUs, and their uses.
    experts: Mutex<Experts>,
    /// Held from the first launch of a step to the last answer of the CPU workers, and by whatever else uses a GPU's
    /// stream: of two sessions on two threads one would have the GPU and the other the workers, and each would wait for
    /// the other; and what one queues while the other captures its step would become part of that.
    turn: Mutex<()>,
}

/// Everything that changes while an engine runs: KV rows and GDN states by slot, and the buffers of a step.
pub struct States {
    cpu: Option<tandem_cpu::State>,
    gpus: Vec<tandem_cuda::State>,
    x: Vec<f32>,    // [n_batch, n_embd] residual stream between devices
    logits: Floats, // [wanted, n_vocab]
}

/// A copy of the recurrent states of one slot on every device.
pub struct Snapshot {
    cpu: Option<tandem_cpu::Snapshot>,
    gpus: Vec<tandem_cuda::Snapshot>,
}

/// A GPU and the CPU workers in a step of both.
struct Meeting<'a> {
    engine: &'a Engine,
    gpu: &'a tandem_cuda::Backend,
    mailbox: &'a tandem_cuda::Mailbox,
    tasks: &'a [Task],
    batch: &'a Batch,
    /// Where the step's hand-overs begin.
    base: u32,
}

impl Meeting<'_> {
    /// Notes the experts that were handed over with `task`, if any were.
    fn note_experts(&self, task: &Task) {
        let Block::Moe(b) = &self.engine.model.blocks[task.blocks.start] else { return };
        let (n, memory) = (self.batch.tokens.len() * b.shape.n_used, self.memory());
        if task.is_share {
            assert!(n <= memory.n_choices);
            // SAFETY: in bounds; the GPU leaves them alone until the answer.
            let ids = unsafe { std::slice::from_raw_parts(memory.ids, n) };
            let n_tokens = self.batch.tokens.len();
            self.engine.experts().note(task.blocks.start, ids, n_tokens, is_decode(self.batch));
        }
    }
}

/// Whether every sequence of the batch has one token.
fn is_decode(batch: &Batch) -> bool {
    batch.tokens.len() == batch.sequences.len()
}

// SAFETY: the mailbox lives as long as the meeting, and the GPU leaves it alone between `wait` and `post`.
unsafe impl Handoff for Meeting<'_> {
    fn memory(&self) -> Memory {
        let (x, sum, len, ids, weights, n_choices) = self.mailbox.memory();
        Memory { x, sum, len, ids, weights, n_choices }
    }

    fn is_ready(&self, task: usize) -> bool {
        self.mailbox.is_ready(self.base, task)
    }

    fn foreseen(&self, task: usize, i: usize) -> Option<u32> {
        let Block::Moe(b) = &self.engine.model.blocks[self.tasks[task].blocks.start] else { return None };
        self.mailbox.foreseen(self.base, task, i).filter(|_| i < b.shape.n_used)
    }

    fn reads_ahead(&self, _: usize) {
        self.mailbox.reads_ahead();
    }

    fn wait(&self, task: usize) -> bool {
        let is_there = self.mailbox.wait(self.base, task, self.batch.tokens.len(), &|| self.gpu.is_alive());
        if is_there {
            self.note_experts(&self.tasks[task]);
        }
        is_there
    }

    fn post(&self, task: usize) {
        self.mailbox.post(self.base, task);
    }
}

/// Ends the step for both sides when it is dropped, unless it is forgotten.
struct AbortOnDrop<'a>(&'a tandem_cuda::Mailbox);

impl Drop for AbortOnDrop<'_> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Engine {
    /// Loads the weights of every block onto its device. `progress` is told the bytes done so far, of
    /// [`Engine::planned_weight_bytes`] in all; it may be called from several threads.
    ///
    /// # Errors
    /// Too little memory, a device that is not there, or a weight that a backend cannot multiply with.
    pub fn load(
        model: Model,
        plan: Plan,
        options: &DeviceOptions,
        source: &dyn TensorSource,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, Error> {
        plan.check(&model).map_err(Error::Batch)?;
        let Runs { runs, gpus: host_tasks } = Runs::new(&plan.places);
        let (mut cpu, mut gpus, mut done) = (None::<tandem_cpu::Backend>, Vec::new(), 0);
        let mut layers = Vec::new();
        for device in plan.devices() {
            let (shares, indices) = plan.shares(&model, device);
            let before = done;
            match device {
                Device::Cpu => {
                    let options = tandem_cpu::Options { threads: plan.threads, isa: options.isa };
                    let (progress, start) = (|n| progress(before + n), Instant::now());
                    let backend = tandem_cpu::Backend::load(&shares, &indices, source, options, &progress)?;
                    let (seconds, gb) = (start.elapsed().as_secs_f64(), backend.weight_bytes() as f64 * 1e-9);
                    tracing::info!(
                        "{device}: {gb:.2} GB of weights loaded in {seconds:.2} s, {:.1} GB/s",
                        gb / seconds
                    );
                    done += backend.weight_bytes();
                    cpu = Some(backend);
                }
                Device::Cuda(ordinal) => {
                    let gpu = std::sync::Arc::new(tandem_cuda::Device::open(ordinal)?);
                    let compiler =
                        tandem_cuda::Compiler::new(options.cuda_libs.as_deref(), options.cubin_cache.clone())?;
                    let blocks: Vec<Block<_>> = indices.iter().map(|&i| shares.blocks[i].clone()).collect();
                    let (n_slots, n_ctx, n_batch) = (plan.n_slots, plan.n_ctx, plan.n_batch);
                    let sizes = tandem_cuda::Options { n_slots, n_ctx, n_batch, kv: plan.kv_dtype };
                    let mut tell = |n: usize, _| progress(before + n as u64);
                    // The GPU reads the panels that the CPU, which comes first, has packed for itself.
                    let streamed = plan.streamed(&model, device).into_iter().map(|(i, share)| HostShare {
                        block: indices.iter().position(|&j| j == i).expect("its home is here"),
                        share,
                        panels: cpu.as_ref().expect("it has shares").panels(i),
                    });
                    let from = plan.stream_from.unwrap_or(usize::MAX);
                    let streamed = Streamed { from, shares: streamed.collect() };
                    let backend = tandem_cuda::Backend::load_streaming(
                        &gpu, compiler, &blocks, streamed, source, &sizes, &mut tell,
                    )?;
                    done += backend.weight_bytes() as u64;
                    let (times, gb) = (backend.load_times(), backend.weight_bytes() as f64 * 1e-9);
                    tracing::info!(
                        "{device}: kernels ready in {:.2} s, {gb:.2} GB of weights loaded in {:.2} s, {:.1} GB/s",
                        times.kernels_s,
                        times.upload_s,
                        gb / times.upload_s
                    );
                    let (_, tasks) = host_tasks.iter().find(|(d, _)| *d == device).expect("a device of the plan");
                    let mut changing = Vec::new();
                    for (local, &i) in indices.iter().enumerate() {
                        let (Block::Moe(b), [home, _]) = (&model.blocks[i], &plan.places[i][..]) else { continue };
                        let changes = plan.has_changing_experts(&model, i);
                        if let Some(cpu) = cpu.as_ref().filter(|_| changes) {
                            changing.push(HostExperts { block: local, panels: cpu.panels(i) });
                        }
                        let bytes = changes.then(|| tandem_cuda::experts::slot_bytes(b) as u64);
                        layers.push(Layer::new(i, gpus.len(), local, b.shape.n_experts, home.part.clone(), bytes));
                    }
                    gpus.push((device, backend.with_host_tasks(tasks.clone()).with_expert_cache(changing)?));
                }
            }
        }
        Ok(Self { model, plan, cpu, gpus, runs, experts: Mutex::new(Experts::new(layers)), turn: Mutex::new(()) })
    }

    fn experts(&self) -> std::sync::MutexGuard<'_, Experts> {
        self.experts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> std::sync::MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses so far of routed experts that a GPU shares with the CPU.
    pub fn expert_uses(&self) -> ExpertUses {
        self.experts().uses().clone()
    }

    /// Experts come to GPUs whose CPU has them too, after a batch of `n_tokens` whose routing is known: what this
    /// queues comes after the step that is under way, whose last blocks hide the time that it takes here.
    fn exchange_experts(&self, n_tokens: usize) -> Result<(), Error> {
        for (i, (_, gpu)) in self.gpus.iter().enumerate() {
            gpu.streamed_uses(&mut |local, counts| self.experts().note_counts(i, local, counts, n_tokens))?;
        }
        self.experts().pass(n_tokens);
        for (i, (_, gpu)) in self.gpus.iter().enumerate() {
            gpu.exchange_experts(|| self.experts().exchanges(i))?;
        }
        Ok(())
    }

    /// The model's description.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The plan that was loaded.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes of weights that the plan counts on all devices.
    pub fn planned_weight_bytes(plan: &Plan) -> u64 {
        plan.devices().into_iter().map(|device| plan.bytes(device, Some(Pool::Weights))).sum()
    }

    /// Bytes of weights by device.
    pub fn weight_bytes(&self) -> Vec<(Device, u64)> {
        let cpu = self.cpu.iter().map(|b| (Device::Cpu, b.weight_bytes()));
        cpu.chain(self.gpus.iter().map(|(device, b)| (*device, b.weight_bytes() as u64))).collect()
    }

    /// GB/s at which the CPU's workers read the weights of a token in a plain loop, again and again for `seconds`; none
    /// where they have none.
    pub fn read_gb_per_s(&self, seconds: f64) -> Option<f64> {
        let (cpu, start, mut bytes) = (self.cpu.as_ref()?, Instant::now(), 0);
        for draw in 0.. {
            bytes += cpu.read_weights(draw);
            if bytes == 0 || start.elapsed().as_secs_f64() >= seconds {
                break;
            }
        }
        Some(bytes as f64 / start.elapsed().as_secs_f64() / 1e9).filter(|_| bytes > 0)
    }

    /// Bytes that the engine and `states` have allocated, by device and pool of the plan. Buffers for loading count
    /// where they were beyond what states take now.
    pub fn bytes(&self, states: &States) -> Vec<(Device, Pool, u64)> {
        let of_state = |device, bytes: StateBytes| {
            let StateBytes { kv, states, logits, scratch } = bytes;
            let pools = [(Pool::Kv, kv), (Pool::States, states), (Pool::Logits, logits), (Pool::Scratch, scratch)];
            pools.map(|(pool, bytes)| (device, pool, bytes))
        };
        let mut all: Vec<_> = self.weight_bytes().into_iter().map(|(d, bytes)| (d, Pool::Weights, bytes)).collect();
        all.extend(states.cpu.iter().flat_map(|state| of_state(Device::Cpu, state.bytes())));
        all.push((Device::Cpu, Pool::Scratch, size_of_val(&*states.x) as u64));
        all.push((Device::Cpu, Pool::Logits, 4 * states.logits.capacity() as u64));
        let upload = tandem_cuda::upload::STAGING_BYTES as u64;
        for ((device, gpu), state) in self.gpus.iter().zip(&states.gpus) {
            all.extend(of_state(*device, state.by_use()));
            all.push((*device, Pool::Staging, gpu.stream_bytes() as u64));
            all.push((*device, Pool::Staging, upload.saturating_sub(state.bytes() as u64)));
            let (staging, counts) = gpu.expert_bytes();
            all.push((*device, Pool::Staging, staging as u64));
            all.push((Device::Cpu, Pool::Pinned, counts as u64));
            all.push((Device::Cpu, Pool::Pinned, (state.pinned_bytes() + BEGUN_BYTES) as u64));
        }
        if !self.gpus.is_empty() {
            all.push((Device::Cpu, Pool::Pinned, upload));
        }
        all
    }

    /// Device memory that each GPU's driver took beside the context and what is ours, as far as other programs stand
    /// still.
    ///
    /// # Errors
    /// What the driver says.
    pub fn driver_bytes(&self, states: &States) -> Result<Vec<(Device, i64)>, Error> {
        let gpus = self.gpus.iter().zip(&states.gpus);
        gpus.map(|((device, gpu), state)| Ok((*device, gpu.driver_bytes(&[state])?))).collect()
    }

    /// Fresh states for the plan's slots.
    ///
    /// # Errors
    /// Too little memory.
    pub fn states(&self) -> Result<States, Error> {
        let plan = &self.plan;
        let (n_slots, n_ctx, n_batch, kv_dtype) = (plan.n_slots, plan.n_ctx, plan.n_batch, plan.kv_dtype);
        let size = StateSize { n_slots, n_ctx, n_batch, kv_dtype };
        let _turn = self.turn();
        Ok(States {
            cpu: self.cpu.as_ref().map(|b| b.state(size)).transpose()?,
            gpus: self.gpus.iter().map(|(_, b)| b.state()).collect::<Result<_, _>>()?,
            x: vec![0.0; n_batch * self.model.n_embd],
            logits: Floats::with_capacity(self.plan.n_logits * self.model.n_vocab)?,
        })
    }

    /// Runs one batch through the model (a sequence at position 0 begins its slot anew) and returns the logits of its
    /// wanted rows `[wanted, n_vocab]`.
    ///
    /// # Errors
    /// A batch that does not fit ([`Error::Batch`]); a backend that failed.
    pub fn step<'s>(&self, states: &'s mut States, batch: &Batch) -> Result<&'s [f32], Error> {
        batch.check(self.plan.n_slots, self.plan.n_ctx, self.model.n_vocab).map_err(Error::Batch)?;
        assert!(batch.tokens.len() <= self.plan.n_batch, "a batch larger than the plan's largest");
        let (n_wanted, n_logits) = (batch.wanted.len(), self.plan.n_logits);
        if n_wanted > n_logits {
            return Err(Error::Batch(format!(
                "logits of {n_wanted} tokens are wanted, but the plan has room for {n_logits}"
            )));
        }
        for sequence in batch.sequences.iter().filter(|s| s.position == 0) {
            states.reset(sequence.slot); // on a GPU a sequence begins anew at position 0 by itself
        }
        let _turn = self.turn();
        let n_embd = self.model.n_embd;
        states.logits.set_len(batch.wanted.len() * self.model.n_vocab);
        let is_decode = batch.wanted.len() == batch.sequences.len() && is_decode(batch);
        if let ([Run::Gpu { tasks, .. }], true) = (&self.runs[..], is_decode) {
            let gpu = &self.gpus[0].1;
            let feed = |(s, &token): (&Sequence, &u32)| Feed { slot: s.slot, position: s.position, token };
            let feeds: Vec<_> = batch.sequences.iter().zip(&batch.tokens).map(feed).collect();
            let greedy = SamplerOptions::greedy();
            gpu.launch(&mut states.gpus[0], &feeds, &vec![(&greedy, &[][..]); feeds.len()])?;
            self.serve(tasks, batch, states)?;
            let exchanged = self.exchange_experts(feeds.len());
            gpu.wait(&mut states.gpus[0])?;
            exchanged?;
            if gpu.has_head() {
                gpu.logits(&states.gpus[0], &mut states.logits)?;
            }
            return Ok(&states.logits);
        }
        for run in &self.runs {
            let States { cpu: cpu_state, gpus, x, logits } = states;
            let x = &mut x[..batch.tokens.len() * n_embd];
            match run {
                Run::Cpu(blocks) => {
                    let (Some(cpu), Some(state)) = (&self.cpu, cpu_state) else { unreachable!("loaded with the plan") };
                    cpu.run(blocks.clone(), batch, state, x, logits)?;
                }
                Run::Gpu { gpu, local, tasks } => {
                    let backend = &self.gpus[*gpu].1;
                    let are_theirs = backend.host_tasks(local.clone(), batch.tokens.len());
                    let tasks = tasks.iter().zip(are_theirs).filter(|(_, is_theirs)| *is_theirs);
                    let tasks: Vec<Task> = tasks.map(|(task, _)| task.clone()).collect();
                    if tasks.is_empty() {
                        backend.run(&mut gpus[*gpu], local.clone(), batch, x, logits)?;
                    } else {
                        self.run_both(*gpu, local, &tasks, batch, states)?;
                    }
                }
            }
        }
        self.exchange_experts(batch.tokens.len())?;
        Ok(&states.logits)
    }

    fn meeting<'a>(
        &'a self,
        gpu: &'a tandem_cuda::Backend,
        mailbox: &'a tandem_cuda::Mailbox,
        tasks: &'a [Task],
        batch: &'a Batch,
    ) -> Meeting<'a> {
        Meeting { engine: self, gpu, mailbox, tasks, batch, base: mailbox.begin() }
    }

    /// The CPU's part of a step that the one GPU has begun.
    fn serve(&self, tasks: &[Task], batch: &Batch, states: &mut States) -> Result<(), Error> {
        let States { cpu: Some(state), gpus, logits, .. } = states else { return Ok(()) };
        let (Some(cpu), Some(mailbox)) = (&self.cpu, gpus[0].mailbox()) else { return Ok(()) };
        let gpu = &self.gpus[0].1;
        let abort = AbortOnDrop(mailbox);
        match cpu.serve(tasks, batch, state, &self.meeting(gpu, mailbox, tasks, batch), logits) {
            Ok(true) => std::mem::forget(abort),
            Ok(false) => {} // the GPU says so when it is waited for
            Err(error) => {
                drop(abort);
                gpu.recover(&gpus[0])?;
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Runs blocks `local` of a GPU with the CPU's tasks between them: the launches are queued on this thread, since
    /// their queue may fill before the workers have answered, and the workers serve on another.
    fn run_both(
        &self,
        gpu: usize,
        local: &Range<usize>,
        tasks: &[Task],
        batch: &Batch,
        states: &mut States,
    ) -> Result<(), Error> {
        let (backend, cpu) = (&self.gpus[gpu].1, self.cpu.as_ref().expect("loaded with the plan"));
        let States { cpu: cpu_state, gpus, x, logits } = states;
        let cpu_state = cpu_state.as_mut().expect("made with the plan");
        let x = &mut x[..batch.tokens.len() * self.model.n_embd];
        let mailbox = gpus[gpu].mailbox().expect("made with the tasks").clone();
        let has_head = tasks.last().is_some_and(|t| t.blocks.end == self.model.blocks.len()) && !backend.has_head();
        let (cpu_logits, gpu_logits) =
            if has_head { (&mut logits[..], &mut [][..]) } else { (&mut [][..], &mut logits[..]) };
        let meeting = self.meeting(backend, &mailbox, tasks, batch);
        let (queued, served) = std::thread::scope(|scope| {
            let workers = scope.spawn(|| {
                let abort = AbortOnDrop(&mailbox);
                let served = cpu.serve(tasks, batch, cpu_state, &meeting, cpu_logits);
                if matches!(served, Ok(true)) {
                    std::mem::forget(abort);
                }
                served
            });
            let abort = AbortOnDrop(&mailbox);
            let queued = backend.run(&mut gpus[gpu], local.clone(), batch, x, gpu_logits);
            if queued.is_ok() {
                std::mem::forget(abort);
            }
            (queued, workers.join())
        });
        if queued.is_err() || !matches!(served, Ok(Ok(true))) {
            backend.recover(&gpus[gpu])?;
        }
        let served = served.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Workers that gave up say nothing of why: the GPU's error does, if it has one.
        if served.is_ok() {
            queued?;
        }
        if served? { Ok(()) } else { Err(tandem_cuda::Error::NoAnswer.into()) }
    }

    /// Starts the step of the last token of `prefix` in `slot`, which has seen the others, and the choice of the next
    /// token as `options` say; false, and nothing done, where this plan or these options need the host for it.
    ///
    /// # Errors
    /// A batch that does not fit; a device that failed.
    pub fn start(
        &self,
        states: &mut States,
        slot: usize,
        prefix: &[u32],
        options: &SamplerOptions,
    ) -> Result<bool, Error> {
        let ([Run::Gpu { tasks, .. }], [(_, gpu)]) = (&self.runs[..], &self.gpus[..]) else { return Ok(false) };
        if !gpu.has_head() || !tandem_cuda::can_sample(options) {
            return Ok(false);
        }
        let position = prefix.len() - 1;
        let feed = Feed { slot, position, token: prefix[position] };
        let _turn = self.turn();
        gpu.launch(&mut states.gpus[0], &[feed], &[(options, prefix)])?;
        let batch = Batch::single(slot, position, &prefix[position..], false);
        self.serve(tasks, &batch, states)?;
        if let Err(error) = self.exchange_experts(1) {
            gpu.wait(&mut states.gpus[0])?;
            return Err(error);
        }
        Ok(true)
    }

    /// The token that the step that was started has chosen.
    ///
    /// # Errors
    /// A device that failed; logits that no token can be chosen from.
    pub fn finish(&self, states: &mut States) -> Result<u32, Error> {
        let _turn = self.turn();
        Ok(self.gpus[0].1.wait(&mut states.gpus[0])?[0])
    }

    /// The hand-overs between the GPU and the CPU workers in the last decode step; empty where a plan has none, or
    /// several GPUs.
    pub fn hand_overs(&self, states: &States) -> Vec<Times> {
        let ([Run::Gpu { tasks, .. }], [state]) = (&self.runs[..], &states.gpus[..]) else { return Vec::new() };
        state.mailbox().map_or(Vec::new(), |mailbox| mailbox.times(tasks.len()))
    }

    /// Whether decode steps are of one GPU and the CPU workers, so that [`Engine::trace`] has something to show.
    pub fn can_trace(&self) -> bool {
        matches!(&self.runs[..], [Run::Gpu { tasks, .. }] if !tasks.is_empty())
    }

    /// The last decode step of one token, if it began when GPUs had been at work for `busy_before` seconds
    /// ([`Engine::busy_seconds`]); `None` where no hand-overs were kept.
    ///
    /// # Errors
    /// What the device says.
    pub fn trace(&self, states: &States, busy_before: f64) -> Result<Option<StepTrace>, Error> {
        let times = self.hand_overs(states);
        let ([Run::Gpu { tasks, .. }], [(device, gpu)]) = (&self.runs[..], &self.gpus[..]) else { return Ok(None) };
        if times.is_empty() || times.len() < tasks.len() {
            return Ok(None);
        }
        let busy = self.busy_seconds(states)? - busy_before;
        let nanoseconds = gpu.has_head().then(|| (busy * 1e9).round() as u64);
        let here: Vec<usize> =
            (0..self.model.blocks.len()).filter(|&i| self.plan.places[i][0].device == *device).collect();
        let name = |i: usize| self.model.blocks[i].name();
        let names = |blocks: &[usize]| blocks.iter().map(|&i| name(i)).collect::<Vec<_>>().join(", ");
        let (mut alone, mut shared, mut served, mut next) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for task in tasks {
            let at = here.partition_point(|&i| i < task.blocks.start);
            alone.push(names(&here[next..at]));
            shared.push(if task.is_share { name(task.blocks.start) } else { String::new() });
            served.push(task.blocks.clone().map(name).collect::<Vec<_>>().join(", "));
            next = at + usize::from(task.is_share);
        }
        alone.push(names(&here[next..]));
        let _turn = self.turn();
        let started = gpu.started(&states.gpus[0])?;
        Ok(Some(StepTrace::new(&times, started, nanoseconds, &alone, &shared, &served)))
    }

    /// Seconds that GPUs were at work in the steps that were started here, first to last kernel.
    ///
    /// # Errors
    /// What the device says.
    pub fn busy_seconds(&self, states: &States) -> Result<f64, Error> {
        let _turn = self.turn();
        self.gpus.iter().zip(&states.gpus).try_fold(0.0, |sum, ((_, gpu), state)| Ok(sum + gpu.busy_seconds(state)?))
    }

    /// Bytes of a copy of the recurrent states of one slot; 0 for models without any.
    pub fn snapshot_bytes(&self, states: &States) -> usize {
        let cpu = states.cpu.as_ref().map_or(0, |state| state.snapshot_bytes());
        cpu + self.gpus.iter().map(|(_, gpu)| gpu.snapshot_bytes()).sum::<usize>()
    }

    /// A copy of the recurrent states of `slot`, in the memory of `old` if there is one.
    ///
    /// # Errors
    /// A device that failed.
    pub fn snapshot(&self, states: &mut States, slot: usize, old: Option<Snapshot>) -> Result<Snapshot, Error> {
        let _turn = self.turn();
        let mut old = old.into_iter().flat_map(|old| old.gpus);
        let gpus = self.gpus.iter().zip(&states.gpus).map(|((_, gpu), state)| gpu.snapshot(state, slot, old.next()));
        Ok(Snapshot {
            gpus: gpus.collect::<Result<_, _>>()?,
            cpu: states.cpu.as_mut().map(|state| state.snapshot(slot)),
        })
    }

    /// Puts a copy of `slot`'s recurrent states back.
    ///
    /// # Errors
    /// A device that failed.
    pub fn restore(&self, states: &mut States, slot: usize, snapshot: &Snapshot) -> Result<(), Error> {
        let _turn = self.turn();
        for ((_, gpu), (state, copy)) in self.gpus.iter().zip(states.gpus.iter_mut().zip(&snapshot.gpus)) {
            gpu.restore(state, slot, copy)?;
        }
        if let (Some(state), Some(copy)) = (&mut states.cpu, &snapshot.cpu) {
            state.restore(slot, copy);
        }
        Ok(())
    }
}

impl States {
    fn reset(&mut self, slot: usize) {
        if let Some(cpu) = &mut self.cpu {
            cpu.reset_slot(slot);
        }
    }

    /// Logits of the last step `[wanted, n_vocab]`.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }
}
