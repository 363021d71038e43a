//! The table of kernels as text, one line each, and how two of them differ.

use std::collections::BTreeSet;

use super::resources::Resources;

/// A kernel, compiled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    /// Crate and name of the file.
    pub(super) file: String,
    pub(super) kernel: String,
    /// Its definitions, or `-`.
    pub(super) variant: String,
    pub(super) arch: String,
    pub(super) resources: Resources,
}

/// The table as it is committed. Columns have fixed widths, so that a new kernel changes no other line.
pub(super) fn render((major, minor): (i32, i32), rows: &[Row]) -> String {
    let mut text = format!(
        "# What each kernel takes: registers and bytes of stack, stored and loaded spills per thread, bytes of static\n\
         # shared memory per block, bytes of constant memory. Written by `cargo xtask kernels --bless` with NVRTC \
         {major}.{minor}.\n{:>5} {:>6} {:>7} {:>6} {:>7} {:>6}  kernel\n",
        "regs", "stack", "stores", "loads", "shared", "const"
    );
    for Row { file, kernel, variant, arch, resources } in rows {
        let Resources { registers, stack, spill_stores, spill_loads, shared, constant } = resources;
        text.push_str(&format!(
            "{registers:>5} {stack:>6} {spill_stores:>7} {spill_loads:>6} {shared:>7} {constant:>6}  \
             {file} {kernel} {variant} {arch}\n"
        ));
    }
    text
}

/// Lines that are only in the old table, with `-`, or only in the new one, with `+`; lines of one kernel together.
pub(super) fn differences(old: &str, new: &str) -> Vec<String> {
    let [old, new]: [BTreeSet<&str>; 2] = [old, new].map(|it| it.lines().collect());
    let gone = old.difference(&new).map(|line| (name(line), '-', line));
    let come = new.difference(&old).map(|line| (name(line), '+', line));
    let mut lines: Vec<(String, char, &&str)> = gone.chain(come).collect();
    lines.sort_by(|a, b| (&a.0, a.1 == '+').cmp(&(&b.0, b.1 == '+')));
    lines.into_iter().map(|(_, sign, line)| format!("{sign}{line}")).collect()
}

/// What a line is about: all behind its numbers.
fn name(line: &str) -> String {
    line.split_whitespace().skip_while(|it| it.parse::<u32>().is_ok()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, registers: u32) -> Row {
        let resources = Resources { registers, ..Resources::default() };
        let [file, variant, arch] = ["a/f", "T=f16", "sm_80"].map(str::to_owned);
        Row { file, kernel: kernel.to_owned(), variant, arch, resources }
    }

    #[test]
    fn a_change_shows_both_lines_and_nothing_else() {
        let version = (13, 0);
        let old = render(version, &[row("add", 20), row("scale", 8), row("sum", 30)]);
        let new = render(version, &[row("add", 20), row("mul", 9), row("sum", 168)]);
        assert_eq!(
            differences(&old, &new),
            [
                "+    9      0       0      0       0      0  a/f mul T=f16 sm_80",
                "-    8      0       0      0       0      0  a/f scale T=f16 sm_80",
                "-   30      0       0      0       0      0  a/f sum T=f16 sm_80",
                "+  168      0       0      0       0      0  a/f sum T=f16 sm_80",
            ]
        );
        assert_eq!(differences(&old, &old), Vec::<String>::new());
        assert_eq!(differences("", &old).len(), old.lines().count());
        assert_eq!(differences(&old, &render((13, 1), &[row("add", 20), row("scale", 8), row("sum", 30)])).len(), 2);
    }
}
