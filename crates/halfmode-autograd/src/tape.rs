//! The tape: an explicit list of ops in the order in which they ran.

use crate::report::lives_anyway;
use crate::watch::Watcher;
use crate::{Cx, Error, MemoryReport, MemoryRow, Op, Result, Role, Saved, Sight};
use halfmode_tensor::{Purpose, Tensor};
use smallvec::SmallVec;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a leaf of a tape: its position among the leaves, in order of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeafId(pub usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    tape: u64,
    node: usize,
    output: usize,
}

/// A value and, when it is tracked, where it came from. Dropping it frees the value unless an op
/// saved it.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    source: Option<Source>,
}

impl Var {
    /// The value.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The value, given up by the variable.
    #[must_use]
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// Whether gradients flow to it.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.source.is_some()
    }
}

#[derive(Debug)]
enum Node {
    Leaf(LeafId),
    Op { op: Box<dyn Op>, call: usize, inputs: Vec<Option<Source>>, saved: Saved, n_outputs: usize },
}

/// Records ops in the order in which they ran. First order only; dropped after one backward pass.
#[derive(Debug)]
pub struct Tape {
    cx: Cx,
    id: u64,
    nodes: Vec<Node>,
    n_leaves: usize,
    observed: Vec<(LeafId, Tensor)>,
    n_calls: usize,
    watcher: Option<Watcher>,
}

impl Tape {
    /// An empty tape.
    #[must_use]
    pub fn new(cx: Cx) -> Self {
        // Identity only: tells variables of different tapes apart, never enters a number.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Tape { cx, id, nodes: Vec::new(), n_leaves: 0, observed: Vec::new(), n_calls: 0, watcher: None }
    }

    /// Shows `watcher` every output, every saved tensor and every gradient of an op's input that is no leaf,
    /// when it is made. A tensor that the watcher clones stays as it is: ops that would work in its place
    /// take a copy.
    pub fn watch(&mut self, watcher: impl FnMut(Sight<'_>) + 'static) {
        self.watcher = Some(Watcher(Box::new(watcher)));
    }

    fn show(&mut self, call: usize, op: &'static str, role: Role, tensor: &Tensor) {
        if let Some(watcher) = &mut self.watcher {
            (watcher.0)(Sight { call, op, role, tensor });
        }
    }

    /// Where and in which formats ops run.
    #[must_use]
    pub fn cx(&self) -> &Cx {
        &self.cx
    }

    /// A value that wants a gradient. Without a backward pass to come it is a constant.
    pub fn leaf(&mut self, value: Tensor) -> Var {
        if !self.cx.save {
            return self.constant(value);
        }
        let source = Source { tape: self.id, node: self.nodes.len(), output: 0 };
        self.nodes.push(Node::Leaf(LeafId(self.n_leaves)));
        self.n_leaves += 1;
        Var { value, source: Some(source) }
    }

    /// A value that wants no gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, source: None }
    }

    /// Notes a value towards which a leaf is to move that no gradient moves, such as a running statistic.
    /// Nothing happens for a variable that is no leaf of this tape.
    pub fn observe(&mut self, leaf: &Var, value: Tensor) {
        let node = leaf.source.filter(|source| source.tape == self.id).and_then(|it| self.nodes.get(it.node));
        if let Some(Node::Leaf(id)) = node {
            self.observed.push((*id, value));
        }
    }

    /// The notes of [`Tape::observe`], in order.
    pub fn take_observed(&mut self) -> Vec<(LeafId, Tensor)> {
        std::mem::take(&mut self.observed)
    }

    /// Runs an op with one output.
    ///
    /// # Errors
    /// Those of the op, and [`Error::ForeignVar`].
    pub fn apply(&mut self, op: impl Op + 'static, inputs: &[&Var]) -> Result<Var> {
        let name = op.name();
        let mut outputs = self.apply_many(Box::new(op), inputs)?;
        if outputs.len() != 1 {
            return Err(Error::Arity { op: name, expected: 1, found: outputs.len() });
        }
        Ok(outputs.remove(0))
    }

    /// Runs an op with any number of outputs.
    ///
    /// # Errors
    /// Those of the op, and [`Error::ForeignVar`].
    pub fn apply_many(&mut self, op: Box<dyn Op>, inputs: &[&Var]) -> Result<Vec<Var>> {
        for (input, var) in inputs.iter().enumerate() {
            if var.source.is_some_and(|source| source.tape != self.id) {
                return Err(Error::ForeignVar { op: op.name(), input });
            }
        }
        let tracked = self.cx.save && inputs.iter().any(|it| it.is_tracked());
        let values: SmallVec<[&Tensor; 16]> = inputs.iter().map(|it| &it.value).collect();
        let cx = Cx { save: tracked, ..self.cx.clone() };
        let (outputs, saved) = op.forward(&cx, &values)?;
        let call = self.n_calls;
        self.n_calls += 1;
        for (idx, output) in outputs.iter().enumerate() {
            self.show(call, op.name(), Role::Output(idx), output);
        }
        for entry in &saved.entries {
            self.show(call, op.name(), Role::Saved(entry.role), &entry.tensor);
        }
        let node = self.nodes.len();
        let vars = outputs
            .into_iter()
            .enumerate()
            .map(|(output, value)| Var { value, source: tracked.then_some(Source { tape: self.id, node, output }) });
        let vars: Vec<Var> = vars.collect();
        if tracked {
            let inputs = inputs.iter().map(|it| it.source).collect();
            self.nodes.push(Node::Op { op, call, inputs, saved, n_outputs: vars.len() });
        }
        Ok(vars)
    }

    /// What the recorded ops keep alive.
    #[must_use]
    pub fn memory_report(&self) -> MemoryReport {
        let mut rows = Vec::new();
        let mut seen: Vec<&Tensor> = Vec::new();
        for node in &self.nodes {
            let Node::Op { op, saved, .. } = node else { continue };
            for entry in &saved.entries {
                let tensor = &entry.tensor;
                let shared = lives_anyway(tensor.purpose()) || seen.iter().any(|it| it.shares_buffer(tensor));
                seen.push(tensor);
                rows.push(MemoryRow {
                    op: op.name(),
                    role: entry.role,
                    shape: tensor.shape().clone(),
                    dtype: tensor.dtype(),
                    bytes: if shared { 0 } else { tensor.bytes() },
                    shared,
                });
            }
        }
        MemoryReport { rows }
    }

    /// Walks the tape backwards from one number, seeded with `seed` (the loss scale). Each op's
    /// saved tensors die the moment it is done; each leaf's gradient is handed out as soon as no
    /// earlier op can add to it.
    ///
    /// # Errors
    /// [`Error::Untracked`] if the loss depends on no leaf, [`Error::NotScalar`] if it is not one
    /// number, those of the ops, and those of `on_leaf`.
    pub fn backward(self, loss: Var, seed: f64, on_leaf: &mut dyn FnMut(LeafId, Tensor) -> Result<()>) -> Result<()> {
        if loss.value.numel() != 1 {
            return Err(Error::NotScalar { found: loss.value.shape().clone() });
        }
        let (device, precision) = (self.cx.device.clone(), loss.value.precision());
        let seed = Tensor::from_slice(&device, &[seed], loss.value.shape().clone(), precision, Purpose::Activation)?;
        self.backward_from(vec![(loss, seed)], on_leaf)
    }

    /// As [`Tape::backward`], from any variables and their gradients.
    ///
    /// # Errors
    /// Those of [`Tape::backward`], but for [`Error::NotScalar`].
    pub fn backward_from(
        mut self,
        seeds: Vec<(Var, Tensor)>,
        on_leaf: &mut dyn FnMut(LeafId, Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut grads = Grads { slots: Vec::new() };
        grads.slots.resize_with(self.nodes.len(), SmallVec::new);
        let mut tracked = false;
        for (input, (var, seed)) in seeds.into_iter().enumerate() {
            let Some(source) = var.source else { continue };
            if source.tape != self.id {
                return Err(Error::ForeignVar { op: "backward", input });
            }
            tracked = true;
            drop(var);
            grads.add(source, seed)?;
        }
        if !tracked {
            return Err(Error::Untracked);
        }
        let cx = self.cx.clone();
        let mut n_uses = self.leaf_uses();
        while let Some(node) = self.nodes.pop() {
            let mut slot = std::mem::take(&mut grads.slots[self.nodes.len()]);
            match node {
                // Used leaves were handed out with their last use; this one is its own seed.
                Node::Leaf(id) => {
                    if let Some(grad) = slot.first_mut().and_then(Option::take) {
                        on_leaf(id, grad)?;
                    }
                }
                Node::Op { inputs, saved, .. } if slot.iter().all(Option::is_none) => {
                    drop(saved);
                    self.release_leaves(&inputs, &mut n_uses, &mut grads, on_leaf)?;
                }
                Node::Op { op, call, inputs, saved, n_outputs } => {
                    slot.resize(n_outputs, None);
                    let needs: SmallVec<[bool; 8]> = inputs.iter().map(Option::is_some).collect();
                    let input_grads = op.backward(&cx, saved, &mut slot, &needs)?;
                    drop(slot);
                    for (idx, (source, grad)) in inputs.iter().zip(input_grads).enumerate() {
                        if let (Some(source), Some(grad)) = (source, grad) {
                            if matches!(self.nodes[source.node], Node::Op { .. }) {
                                self.show(call, op.name(), Role::Gradient(idx), &grad);
                            }
                            grads.add(*source, grad)?;
                        }
                    }
                    self.release_leaves(&inputs, &mut n_uses, &mut grads, on_leaf)?;
                }
            }
        }
        Ok(())
    }

    /// How often each node that is a leaf is an input of an op.
    fn leaf_uses(&self) -> Vec<usize> {
        let mut n_uses = vec![0; self.nodes.len()];
        for node in &self.nodes {
            if let Node::Op { inputs, .. } = node {
                inputs.iter().flatten().for_each(|source| n_uses[source.node] += 1);
            }
        }
        n_uses
    }

    /// Hands out the gradients of those inputs of a finished op that are leaves and have no use left.
    fn release_leaves(
        &self,
        inputs: &[Option<Source>],
        n_uses: &mut [usize],
        grads: &mut Grads,
        on_leaf: &mut dyn FnMut(LeafId, Tensor) -> Result<()>,
    ) -> Result<()> {
        for source in inputs.iter().flatten() {
            n_uses[source.node] -= 1;
            let Node::Leaf(id) = &self.nodes[source.node] else { continue };
            if n_uses[source.node] == 0
                && let Some(grad) = grads.slots[source.node].first_mut().and_then(Option::take)
            {
                on_leaf(*id, grad)?;
            }
        }
        Ok(())
    }
}

/// Gradients on their way to the nodes that made the values.
struct Grads {
    slots: Vec<SmallVec<[Option<Tensor>; 2]>>,
}

impl Grads {
    /// Moves the first contribution in; adds later ones in place, into a copy only when the buffer
    /// is shared.
    fn add(&mut self, source: Source, grad: Tensor) -> Result<()> {
        let slot = &mut self.slots[source.node];
        if slot.len() <= source.output {
            slot.resize(source.output + 1, None);
        }
        match &mut slot[source.output] {
            empty @ None => *empty = Some(grad),
            Some(sum) => {
                if !sum.is_unshared() {
                    *sum = sum.copy(Purpose::Activation)?;
                }
                sum.add_assign(&grad)?;
            }
        }
        Ok(())
    }
}
