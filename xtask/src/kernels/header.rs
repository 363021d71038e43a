//! The first lines of a kernel file: what it is compiled for.

const ARCHS: &str = "// archs:";
const VARIANTS: &str = "// variants:";
/// How a long list of variants goes on.
const MORE: &str = "//   ";

/// What a kernel file is compiled for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Such as `sm_90a`.
    pub(crate) archs: Vec<String>,
    /// Sets of definitions `NAME=VALUE`; an empty set is the file as it is.
    pub(crate) variants: Vec<Vec<String>>,
}

/// What is wrong with the first lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// From 1.
    pub(crate) line: usize,
    pub(crate) problem: String,
}

impl Header {
    /// Reads
    ///
    /// ```text
    /// // archs: sm_80 sm_90a
    /// // variants: T=f32,N=1 T=f16,N=2
    /// //   T=bf16,N=2
    /// ```
    ///
    /// where `-` stands for the set without definitions.
    pub(crate) fn parse(text: &str) -> Result<Self, Malformed> {
        let malformed = |line, problem: String| Malformed { line, problem };
        let mut lines = text.lines().peekable();
        let mut field = |number: usize, label: &str| {
            let line = lines.next().and_then(|it| it.strip_prefix(label));
            let mut words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
            while let Some(more) = lines.peek().and_then(|it| it.strip_prefix(MORE)) {
                words.extend(more.split_whitespace());
                lines.next();
            }
            let problem = || format!("line {number} of a kernel file is `{label} …`, and it is not empty");
            if words.is_empty() { Err(malformed(number, problem())) } else { Ok(words) }
        };
        let archs = field(1, ARCHS)?;
        let variants = field(2, VARIANTS)?;
        if let Some(odd) = archs.iter().find(|it| !it.starts_with("sm_")) {
            return Err(malformed(1, format!("`{odd}` is no architecture: write `sm_80`, `sm_90a`")));
        }
        let set = |word: &&str| match *word {
            "-" => Ok(Vec::new()),
            set => set.split(',').map(define).collect(),
        };
        let variants: Result<Vec<_>, String> = variants.iter().map(set).collect();
        let variants = variants.map_err(|it| malformed(2, it))?;
        Ok(Self { archs: archs.into_iter().map(str::to_owned).collect(), variants })
    }
}

fn define(text: &str) -> Result<String, String> {
    let is_name = |it: &str| {
        it.starts_with(|it: char| it.is_ascii_alphabetic() || it == '_')
            && it.chars().all(|it| it.is_ascii_alphanumeric() || it == '_')
    };
    match text.split_once('=') {
        Some((name, value)) if is_name(name) && !value.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("`{text}` is no definition: write `NAME=VALUE`, or `-` for none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(text: &str) -> Vec<Vec<String>> {
        Header::parse(text).unwrap().variants
    }

    #[test]
    fn sets_of_definitions_are_read() {
        let header = Header::parse("// archs: sm_80 sm_90a\n// variants: A=1,B=f16 A=2\n// Text.\n").unwrap();
        assert_eq!(header.archs, ["sm_80", "sm_90a"]);
        assert_eq!(header.variants, [vec!["A=1", "B=f16"], vec!["A=2"]]);
        assert_eq!(sets("// archs: sm_80\n// variants: -"), [Vec::<String>::new()]);
        assert_eq!(sets("// archs: sm_80\n// variants: A=1\n//   A=2 A=3\n//   -\n//\n// Text").len(), 4);
    }

    #[test]
    fn what_is_missing_is_named() {
        let line = |text: &str| Header::parse(text).unwrap_err().line;
        assert_eq!(line(""), 1);
        assert_eq!(line("#include <x>\n"), 1);
        assert_eq!(line("// archs: sm_80\n"), 2);
        assert_eq!(line("// archs: sm_80\n// variants:\n"), 2);
        assert_eq!(line("// archs: 90\n// variants: -\n"), 1);
        for bad in ["A", "=1", "A=", "1A=2", "A=1,", "A=1,-"] {
            assert_eq!(line(&format!("// archs: sm_80\n// variants: {bad}\n")), 2, "{bad}");
        }
    }
}
