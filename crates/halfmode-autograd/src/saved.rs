//! What one op keeps for its backward pass.

use crate::{Cx, Error, Result};
use halfmode_tensor::{Purpose, Tensor};

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) role: &'static str,
    pub(crate) tensor: Tensor,
}

/// What one op keeps for its backward pass: named tensors, each in a precision of its own.
#[derive(Debug)]
pub struct Saved {
    op: &'static str,
    pub(crate) entries: Vec<Entry>,
}

impl Saved {
    /// Nothing yet, for the op of this name.
    #[must_use]
    pub fn new(op: &'static str) -> Self {
        Saved { op, entries: Vec::new() }
    }

    /// Keeps a tensor in the precision that the policy names for (`op`, `role`), shared if it is
    /// in that precision already.
    ///
    /// # Errors
    /// Those of the cast.
    pub fn keep(mut self, cx: &Cx, role: &'static str, x: &Tensor) -> Result<Self> {
        if cx.save {
            let tensor = x.cast(cx.policy.saved(self.op, role), Purpose::Saved)?;
            self.entries.push(Entry { role, tensor });
        }
        Ok(self)
    }

    /// Refers to a tensor as it is: one that lives anyway, such as a parameter, or one that was
    /// made in the right precision for this purpose.
    #[must_use]
    pub fn share(mut self, cx: &Cx, role: &'static str, x: &Tensor) -> Self {
        if cx.save {
            self.entries.push(Entry { role, tensor: x.clone() });
        }
        self
    }

    /// Takes a tensor out, so that it dies when the caller drops it.
    ///
    /// # Errors
    /// [`Error::MissingRole`] if forward saved nothing under this name.
    pub fn take(&mut self, role: &'static str) -> Result<Tensor> {
        let found = self.entries.iter().position(|entry| entry.role == role);
        let idx = found.ok_or(Error::MissingRole { op: self.op, role })?;
        Ok(self.entries.remove(idx).tensor)
    }

    /// Takes all tensors of this name out, in the order in which they were saved; none if there is none.
    #[must_use]
    pub fn take_all(&mut self, role: &'static str) -> Vec<Tensor> {
        let entries = std::mem::take(&mut self.entries);
        let (taken, left): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|entry| entry.role == role);
        self.entries = left;
        taken.into_iter().map(|entry| entry.tensor).collect()
    }
}
