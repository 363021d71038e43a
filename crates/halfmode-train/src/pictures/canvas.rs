//! A picture in memory: filled boxes, lines, text; then PNG.

use super::{Error, font};

/// Red, green, blue.
pub(super) type Rgb = [u8; 3];

/// Font pixels are drawn as squares of this many pixels.
pub(super) const TEXT_SCALE: usize = 2;
/// Height of a line of text in pixels.
pub(super) const TEXT_HEIGHT: usize = font::HEIGHT * TEXT_SCALE;

/// An RGB picture; what falls outside is not drawn.
pub(super) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    /// A picture of one colour.
    pub(super) fn new(width: usize, height: usize, background: Rgb) -> Self {
        Self { width, height, pixels: background.repeat(width * height) }
    }

    /// Sets one pixel.
    pub(super) fn set(&mut self, x: usize, y: usize, colour: Rgb) {
        if x < self.width && y < self.height {
            let start = 3 * (y * self.width + x);
            self.pixels[start..start + 3].copy_from_slice(&colour);
        }
    }

    /// Fills the box with the corner `(x, y)` and the given size.
    pub(super) fn fill(&mut self, [x, y]: [usize; 2], [width, height]: [usize; 2], colour: Rgb) {
        for row in y..y + height {
            for column in x..x + width {
                self.set(column, row, colour);
            }
        }
    }

    /// Draws the border of a box, one pixel wide.
    pub(super) fn outline(&mut self, [x, y]: [usize; 2], [width, height]: [usize; 2], colour: Rgb) {
        let (right, bottom) = ((x + width).saturating_sub(1), (y + height).saturating_sub(1));
        self.fill([x, y], [width, 1], colour);
        self.fill([x, bottom], [width, 1], colour);
        self.fill([x, y], [1, height], colour);
        self.fill([right, y], [1, height], colour);
    }

    /// Draws a line two pixels wide between two points.
    pub(super) fn line(&mut self, from: [f64; 2], to: [f64; 2], colour: Rgb) {
        let steps = (to[0] - from[0]).abs().max((to[1] - from[1]).abs()).ceil().max(1.0);
        for step in 0..=steps as usize {
            let t = step as f64 / steps;
            let at = |axis: usize| (from[axis] + t * (to[axis] - from[axis])).max(0.0) as usize;
            self.fill([at(0), at(1)], [2, 2], colour);
        }
    }

    /// Writes text with its upper left corner at `(x, y)`.
    pub(super) fn text(&mut self, [x, y]: [usize; 2], text: &str, colour: Rgb) {
        for (idx, character) in text.chars().enumerate() {
            let left = x + idx * font::ADVANCE * TEXT_SCALE;
            for (column, row) in font::glyph(character) {
                let corner = [left + column * TEXT_SCALE, y + row * TEXT_SCALE];
                self.fill(corner, [TEXT_SCALE, TEXT_SCALE], colour);
            }
        }
    }

    /// The picture as the bytes of a PNG file.
    pub(super) fn png(&self) -> Result<Vec<u8>, Error> {
        let mut file = Vec::new();
        let size = |it: usize| u32::try_from(it).unwrap_or(u32::MAX);
        let mut encoder = png::Encoder::new(&mut file, size(self.width), size(self.height));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::High);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(file)
    }
}

/// Width of `text` on the canvas in pixels.
pub(super) fn text_width(text: &str) -> usize {
    font::text_width(text) * TEXT_SCALE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawing_outside_is_harmless() {
        let mut canvas = Canvas::new(4, 3, [255; 3]);
        canvas.fill([2, 1], [9, 9], [1, 2, 3]);
        canvas.line([-3.0, -3.0], [20.0, 20.0], [0; 3]);
        canvas.text([3, 2], "m", [9; 3]);
        canvas.outline([0, 0], [40, 40], [7; 3]);
        assert_eq!(canvas.pixels.len(), 4 * 3 * 3);
        assert!(canvas.png().is_ok());
    }
}
