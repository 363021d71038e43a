//! Many small images side by side, and a table of counts, as PNG.

use super::Error;
use super::canvas::{Canvas, Rgb, TEXT_HEIGHT, text_width};

/// A small image with a line of text below.
#[derive(Debug, Clone)]
pub struct Tile<'a> {
    /// Bytes, `[channels, rows, columns]`, of one colour or three.
    pub pixels: &'a [u8],
    /// Rows and columns.
    pub extents: [usize; 2],
    /// What is written below; ASCII.
    pub label: String,
    /// Whether it stands out.
    pub marked: bool,
}

const MARGIN: usize = 12;
const INK: Rgb = [29, 39, 51];
const MARK: Rgb = [196, 60, 20];
/// Pixels that an image is enlarged to at least.
const SIDE: usize = 112;

/// Draws tiles in rows of `n_columns`.
///
/// # Errors
/// [`Error::NoPanels`], [`Error::Length`] for pixels that are not as many as the extents say, and those of the encoder.
pub fn tiles_png(tiles: &[Tile<'_>], n_columns: usize) -> Result<Vec<u8>, Error> {
    let Some(first) = tiles.first() else { return Err(Error::NoPanels) };
    let zoom = SIDE.div_ceil(first.extents[1].max(1)).max(1);
    let n_columns = n_columns.clamp(1, tiles.len());
    let label = tiles.iter().map(|it| text_width(&it.label)).max().unwrap_or(0);
    let size = [(first.extents[1] * zoom).max(label), first.extents[0] * zoom];
    let step = [size[0] + MARGIN, size[1] + TEXT_HEIGHT + 2 * MARGIN];
    let n_rows = tiles.len().div_ceil(n_columns);
    let mut canvas = Canvas::new(n_columns * step[0] + MARGIN, n_rows * step[1] + MARGIN, [255; 3]);
    for (idx, tile) in tiles.iter().enumerate() {
        let [rows, columns] = tile.extents;
        let (points, expected) = (rows * columns, 3 * rows * columns);
        if points == 0 || ![points, expected].contains(&tile.pixels.len()) {
            return Err(Error::Length { shape: vec![3, rows, columns], expected, found: tile.pixels.len() });
        }
        let corner = [MARGIN + idx % n_columns * step[0], MARGIN + idx / n_columns * step[1]];
        for at in 0..points {
            let colour: Rgb = std::array::from_fn(|c| tile.pixels[(at + c * points) % tile.pixels.len()]);
            canvas.fill([corner[0] + at % columns * zoom, corner[1] + at / columns * zoom], [zoom; 2], colour);
        }
        let ink = if tile.marked { MARK } else { INK };
        canvas.outline(corner, [columns * zoom, rows * zoom], ink);
        canvas.text([corner[0], corner[1] + rows * zoom + 4], &tile.label, ink);
    }
    canvas.png()
}

/// Draws counts `[truth][prediction]` as a table, the darker the larger the share of a row.
///
/// # Errors
/// [`Error::NoPanels`] without names, [`Error::Length`] for counts that are no square of them, and those of the
/// encoder.
pub fn confusion_png(names: &[String], counts: &[usize]) -> Result<Vec<u8>, Error> {
    let n = names.len();
    if n == 0 {
        return Err(Error::NoPanels);
    }
    if counts.len() != n * n {
        return Err(Error::Length { shape: vec![n, n], expected: n * n, found: counts.len() });
    }
    let widest = names.iter().map(|name| text_width(name)).max().unwrap_or(0);
    let digits = counts.iter().map(|count| text_width(&count.to_string())).max().unwrap_or(0);
    let (width, height) = (widest.max(digits) + MARGIN, TEXT_HEIGHT + 2 * MARGIN);
    let (left, top) = (widest + 2 * MARGIN, 2 * TEXT_HEIGHT + 3 * MARGIN);
    let mut canvas = Canvas::new(left + n * width + MARGIN, top + n * height + MARGIN, [255; 3]);
    canvas.text([MARGIN, MARGIN], "rows: truth, columns: prediction", INK);
    for (i, row) in counts.chunks_exact(n).enumerate() {
        let all = row.iter().sum::<usize>().max(1) as f64;
        canvas.text([left + i * width, top - TEXT_HEIGHT - 4], &names[i], INK);
        canvas.text([MARGIN, top + i * height + MARGIN], &names[i], INK);
        for (j, &count) in row.iter().enumerate() {
            let share = count as f64 / all;
            let hue = if i == j { [35.0, 104.0, 176.0] } else { [208.0, 106.0, 11.0] };
            let colour = hue.map(|c: f64| (255.0 + share * (c - 255.0)) as u8);
            let corner = [left + j * width, top + i * height];
            canvas.fill(corner, [width, height], colour);
            canvas.outline(corner, [width, height], [220; 3]);
            let ink = if share > 0.6 { [255; 3] } else { INK };
            canvas.text([corner[0] + MARGIN / 2, corner[1] + MARGIN], &count.to_string(), ink);
        }
    }
    canvas.png()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn grey_and_coloured_images_are_drawn_and_wrong_counts_refused() {
        let (grey, colour) = ([7; 12], [9; 36]);
        let tile = |pixels| Tile { pixels, extents: [3, 4], label: "a > b".to_owned(), marked: true };
        assert!(tiles_png(&[tile(&grey), tile(&colour)], 8).unwrap().starts_with(b"\x89PNG"));
        assert!(matches!(tiles_png(&[tile(&grey[..5])], 8), Err(Error::Length { found: 5, .. })));
        assert!(matches!(tiles_png(&[], 8), Err(Error::NoPanels)));
        let names = ["disc".to_owned(), "bar".to_owned()];
        assert!(confusion_png(&names, &[5, 1, 0, 0]).unwrap().starts_with(b"\x89PNG"));
        assert!(confusion_png(&names, &[5, 1, 0]).is_err() && confusion_png(&[], &[]).is_err());
    }
}
