// Draw the report's plots: each replaces its still picture once it is drawn. No request is made.
(() => {
  const narrow = document.documentElement.clientWidth < 640;
  const drawn = {}; // name: { view, text of its specification, element }

  async function draw(name, plot) {
    const place = document.getElementById("plot-" + name);
    const text = JSON.stringify(plot);
    const before = drawn[name];
    if (before && before.text === text && place.contains(before.element)) return;
    const still = place.querySelector(".still");
    const live = document.createElement("div");
    live.className = "live";
    if (before) live.style.visibility = "hidden"; // the old plot is seen until the new one is there
    if (still) still.hidden = true;
    place.append(live);
    const columns = place.clientWidth < 420 ? 1 : place.clientWidth < 700 ? 2 : 3;
    const axis = narrow ? { ...plot.config.axis, labelLimit: 130 } : plot.config.axis;
    plot = { ...plot, config: { ...plot.config, axis, legend: { ...plot.config.legend, columns } } };
    try {
      const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false };
      options.tooltip = { disableDefaultStyle: true };
      const view = (await vegaEmbed(live, { ...plot, width: "container" }, options)).view;
      if (before) {
        before.view.finalize();
        before.element.remove();
      }
      if (still) still.remove();
      live.style.visibility = "";
      drawn[name] = { view, text, element: live };
    } catch (error) {
      console.error(error);
      live.remove();
      if (still) still.hidden = false;
    }
  }

  function bindSlider({ layers, prompts }) {
    const slider = document.getElementById("layer");
    if (!slider || !layers || !drawn.projection) return;
    const shown = document.getElementById("layer-shown");
    const move = () => {
      const layer = layers[Number(slider.value)];
      const rows = ["harmful", "harmless"].flatMap((set) =>
        layer[set].map(([x, y], place) => ({ x, y, set, prompt: prompts[set][place] })),
      );
      drawn.projection.view.data("points", rows).runAsync();
      shown.textContent = layer.text;
      slider.setAttribute("aria-valuetext", layer.text);
    };
    slider.oninput = move;
    slider.closest(".slider").hidden = false;
    move();
  }

  // Draw the plots that are new or have changed; the others stay as they are.
  async function drawAll(plots, layers) {
    for (const name of Object.keys(drawn)) {
      if (name in plots && document.getElementById("plot-" + name)) continue;
      drawn[name].view.finalize();
      delete drawn[name];
    }
    for (const [name, plot] of Object.entries(plots)) await draw(name, plot);
    bindSlider(layers || {});
    document.documentElement.dataset.drawn = Object.keys(drawn).join(" ");
  }

  const read = (id) => JSON.parse((document.getElementById(id) || { textContent: "{}" }).textContent);
  window.report = { drawAll, first: drawAll(read("plots"), read("layers")) };
})();
