(() => {
  const config = { displayModeBar: false, responsive: true };
  const ids = [];
  const coloured = (layout, ink) => {
    layout.font = { ...layout.font, color: ink };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      layout[key] = { gridcolor: "rgba(128,128,128,0.25)", zerolinecolor: "rgba(128,128,128,0.45)", ...layout[key] };
    }
    return layout;
  };
  const ink = () => getComputedStyle(document.body).color;
  for (const source of document.querySelectorAll("script[data-plot]")) {
    const { data, layout } = JSON.parse(source.textContent);
    ids.push(source.dataset.plot);
    Plotly.newPlot(source.dataset.plot, data, coloured(layout, ink()), config);
  }
  const repaint = (colour) => ids.forEach((id) => Plotly.relayout(id, { "font.color": colour }));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => repaint(ink()));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((box) => { box.open = true; });
    if (dark.matches) repaint("#1b1f24");
  });
  addEventListener("afterprint", () => { if (dark.matches) repaint(ink()); });
})();
