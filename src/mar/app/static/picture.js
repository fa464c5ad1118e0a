// Pictures on canvases: enlarged without blur, with their tokens.

export const decode = async (url) => {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
};

export const canvasOf = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Pixels of the screen for each pixel of a picture: a whole number, so that none is wider than another.
export function scaleFor(size, side) {
  const wanted = (side * (devicePixelRatio || 1)) / Math.max(size.width, size.height);
  return wanted < 1 ? wanted : wanted < 2 ? Math.round(wanted) : Math.floor(wanted + 0.05);
}

// Draws an image over all of a canvas, which gets about this side on the page.
export function paint(canvas, image, size, side) {
  const scale = scaleFor(size, side);
  const [width, height] = [Math.round(size.width * scale), Math.round(size.height * scale)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.style.width = `${width / (devicePixelRatio || 1)}px`;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 1;
  if (image) context.drawImage(image, 0, 0, width, height);
  else context.clearRect(0, 0, width, height);
  return context;
}

// Calls back with each token's rectangle on a canvas, in whole pixels.
export function eachToken(canvas, grid, visit) {
  const edges = (length, count) => Array.from({ length: count + 1 }, (_, i) => Math.round((i * length) / count));
  const [xs, ys] = [edges(canvas.width, grid.columns), edges(canvas.height, grid.rows)];
  for (let row = 0; row < grid.rows; row++) {
    for (let column = 0; column < grid.columns; column++) {
      visit(row, column, xs[column], ys[row], xs[column + 1] - xs[column], ys[row + 1] - ys[row]);
    }
  }
}

// Draws a reveal at a step: tokens of later steps are covered, those of this step are framed.
export function paintReveal(canvas, reveal, step, { side, order = false, live = false }) {
  const frame = reveal.frames.find((each) => each.step >= step) || reveal.frames.at(-1);
  const context = paint(canvas, frame?.image, reveal.size, side);
  const covered = [color("--token"), color("--token-dot")];
  const accent = color("--accent");
  eachToken(canvas, reveal.grid, (row, column, x, y, w, h) => {
    const at = reveal.revealedAt?.[row]?.[column] ?? 0;
    if (at > step || !frame) {
      context.fillStyle = covered[0];
      context.fillRect(x, y, w, h);
      context.fillStyle = covered[1];
      context.beginPath();
      context.arc(x + w / 2, y + h / 2, order ? 0 : Math.min(w, h) / 9, 0, 7);
      context.fill();
    } else if (at === step && at > 0 && live) {
      context.strokeStyle = accent;
      context.lineWidth = Math.max(1.5, w / 14);
      context.strokeRect(x + 1, y + 1, w - 2, h - 2);
    }
    if (order && at > 0) {
      const hue = 260 - 220 * (at / reveal.steps);
      if (at <= step) {
        context.fillStyle = `hsl(${hue} 85% 55% / 0.45)`;
        context.fillRect(x, y, w, h);
      }
      if (w < 20) {
        context.fillStyle = `hsl(${hue} 75% 55%)`;
        context.fillRect(x + w / 3, y + h / 3, w / 3, h / 3);
      } else {
        context.fillStyle = at <= step ? "#fff" : `hsl(${hue} 70% 55%)`;
        context.shadowColor = at <= step ? "rgb(0 0 0 / 0.8)" : "transparent";
        context.shadowBlur = 4;
        context.font = `600 ${Math.min(w * 0.42, 26)}px system-ui`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(at, x + w / 2, y + h / 2 + 1);
        context.shadowBlur = 0;
      }
    }
  });
}
