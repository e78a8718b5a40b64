// Draw the report's plots: each replaces its still picture once it is drawn. No request is made.
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const plots = read("plots");
  const narrow = document.documentElement.clientWidth < 640;
  const views = {};
  for (const [name, plot] of Object.entries(plots)) {
    const place = document.getElementById("plot-" + name);
    const still = place.querySelector(".still");
    const live = document.createElement("div");
    live.className = "live";
    if (narrow) {
      plot.config = {
        ...plot.config,
        axis: { ...plot.config.axis, labelLimit: 130 },
        legend: { ...plot.config.legend, columns: 1 },
      };
    }
    still.hidden = true;
    place.append(live);
    try {
      const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false };
      options.tooltip = { disableDefaultStyle: true };
      views[name] = (await vegaEmbed(live, { ...plot, width: "container" }, options)).view;
      still.remove();
    } catch (error) {
      console.error(error);
      live.remove();
      still.hidden = false;
    }
  }
  const slider = document.getElementById("layer");
  if (slider && views.projection) {
    const { layers, prompts } = read("layers");
    const shown = document.getElementById("layer-shown");
    const move = () => {
      const layer = layers[Number(slider.value)];
      const rows = ["harmful", "harmless"].flatMap((set) =>
        layer[set].map(([x, y], place) => ({ x, y, set, prompt: prompts[set][place] })),
      );
      views.projection.data("points", rows).runAsync();
      shown.textContent = layer.text;
      slider.setAttribute("aria-valuetext", layer.text);
    };
    slider.addEventListener("input", move);
    slider.closest(".slider").hidden = false;
    move();
  }
  document.documentElement.dataset.drawn = Object.keys(views).join(" ");
})();
