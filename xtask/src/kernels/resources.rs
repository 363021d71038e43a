//! What the assembler says of each kernel, read from the compiler's log.

/// What one thread or block of a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Resources {
    /// Registers of a thread.
    pub(super) registers: u32,
    /// Bytes of a thread's stack.
    pub(super) stack: u32,
    /// Bytes that a thread writes to memory for want of registers.
    pub(super) spill_stores: u32,
    /// Bytes that it reads back.
    pub(super) spill_loads: u32,
    /// Bytes of a block's shared memory that the source names; a launch may add more.
    pub(super) shared: u32,
    /// Bytes of constant memory, arguments included.
    pub(super) constant: u32,
}

/// Kernels in the order of the log, which looks like
///
/// ```text
/// ptxas info    : Compiling entry function 'add' for 'sm_80'
/// ptxas info    : Function properties for add
/// ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 18 registers, used 1 barriers, 2048 bytes smem, 372 bytes cmem[0]
/// ```
///
/// with a function that is not inlined in between having properties of its own.
pub(super) fn parse(log: &str) -> Result<Vec<(String, Resources)>, String> {
    let mut kernels: Vec<(String, Option<u32>, Resources)> = Vec::new();
    let mut is_entry = false;
    for line in log.lines() {
        // A line that goes on has a dot where others have a colon.
        let text = line.split_once(" : ").or_else(|| line.split_once(" . ")).map_or(line, |(_, text)| text).trim();
        if let Some(rest) = text.strip_prefix("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default();
            kernels.push((name.to_owned(), None, Resources::default()));
        }
        let Some((name, registers, resources)) = kernels.last_mut() else { continue };
        if let Some(function) = text.strip_prefix("Function properties for ") {
            is_entry = function.trim() == name;
        } else if text.contains("bytes stack frame") {
            let [stack, stores, loads] =
                ["bytes stack frame", "bytes spill stores", "bytes spill loads"].map(|it| amount(text, it));
            // Values of a called function spill on the kernel's time as well.
            resources.spill_stores += stores;
            resources.spill_loads += loads;
            if is_entry {
                resources.stack = stack;
            }
        } else if let Some(used) = text.strip_prefix("Used ") {
            *registers = Some(amount(used, "registers"));
            resources.shared = amount(text, "bytes smem");
            resources.constant = amount(text, "bytes cmem[");
        }
    }
    if kernels.is_empty() {
        return Err("the compiler's log names no kernel".to_owned());
    }
    let complete = |(name, registers, resources): (String, Option<u32>, Resources)| match registers {
        Some(registers) => Ok((name, Resources { registers, ..resources })),
        None => Err(format!("the compiler's log has no registers of kernel {name}")),
    };
    kernels.into_iter().map(complete).collect()
}

/// The sum of the numbers before `unit` in a list with commas.
fn amount(text: &str, unit: &str) -> u32 {
    let number = |it: &str| {
        let (number, rest) = it.trim().split_once(' ')?;
        rest.starts_with(unit).then(|| number.parse::<u32>().ok())?
    };
    text.split(',').filter_map(number).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read() {
        let log = "\
k.cu(3): warning #177-D: variable \"x\" was declared but never referenced

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'sum' for 'sm_80'
ptxas info    : Function properties for sum
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for helper
ptxas         .     40 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 2048 bytes smem, 372 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 9.275 ms
ptxas info    : Compiling entry function 'add' for 'sm_80'
ptxas info    : Function properties for add
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers";
        let sum = Resources { registers: 18, stack: 8, spill_stores: 5, spill_loads: 14, shared: 2048, constant: 380 };
        let add = Resources { registers: 28, ..Resources::default() };
        assert_eq!(parse(log).unwrap(), [("sum".to_owned(), sum), ("add".to_owned(), add)]);
    }

    #[test]
    fn an_incomplete_log_is_refused() {
        assert!(parse("ptxas info    : 0 bytes gmem").unwrap_err().contains("no kernel"));
        let cut = "ptxas info    : Compiling entry function 'sum' for 'sm_80'";
        assert!(parse(cut).unwrap_err().contains("registers of kernel sum"));
    }
}
