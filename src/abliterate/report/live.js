// Keep the page of a run at work up to date: ask its server for news, and put in what has changed, where the reader left it.
(() => {
  const state = JSON.parse(document.getElementById("live-state").textContent);
  const status = document.getElementById("live-status");
  const main = document.querySelector("main");
  const shown = {}; // section: the HTML that it was given
  const PAUSE = 1500, HIDDEN = 5000, TRIES = 5; // milliseconds, and failures in a row after which the server is gone
  let failures = 0;
  document.documentElement.style.overflowAnchor = "none"; // `anchored` does it, for replaced elements, too

  // Numbers in a label may change with each trial.
  const label = (text) => text.replace(/\d+/g, "#");
  // [key, element] of what has a state or a place, the same key before and after an update.
  function keyed(root, selector, name = () => "") {
    const count = {};
    return [...root.querySelectorAll(selector)].map((element) => {
      const key = element.tagName + "|" + label(name(element));
      count[key] = (count[key] || 0) + 1;
      return [key + "|" + count[key], element];
    });
  }
  const folds = (root) => keyed(root, "details", (one) => one.querySelector("summary").textContent);
  const scrolls = (root) => keyed(root, ".scroll", (one) => one.getAttribute("aria-label") || "");
  const marks = (root) => keyed(root, "h2, h3, p, figure, details, .scroll, article");

  // Run `change`, and scroll so that what was at the top of the window is there again.
  function anchored(change) {
    const section = [...main.children].find((one) => one.getBoundingClientRect().bottom > 0);
    if (window.scrollY < 1 || !section) return change();
    const inside = marks(section).find(([, one]) => one.getBoundingClientRect().bottom > 0);
    const before = (inside ? inside[1] : section).getBoundingClientRect().top;
    change();
    const kept = document.getElementById(section.id);
    if (!kept) return;
    const again = inside && marks(kept).find(([key]) => key === inside[0]);
    window.scrollBy({ top: (again ? again[1] : kept).getBoundingClientRect().top - before, behavior: "instant" });
  }

  // Give a section new content, with folds, sideways scrolling, slider, focus and plots as they were.
  function fill(section, html) {
    const body = section.querySelector(".body");
    const open = new Map(folds(body).map(([key, one]) => [key, one.open]));
    const sides = new Map(scrolls(body).map(([key, one]) => [key, one.scrollLeft]));
    const plots = new Map([...body.querySelectorAll(".plot")].map((one) => [one.id, one]));
    const slider = body.querySelector("#layer");
    const focus = [...folds(body), ...scrolls(body)].find(([, one]) =>
      one.tagName === "DETAILS" ? one.firstElementChild === document.activeElement : one === document.activeElement,
    );
    const onSlider = slider && slider === document.activeElement;
    body.innerHTML = html;
    for (const fresh of body.querySelectorAll(".plot")) {
      const old = plots.get(fresh.id);
      if (!old) continue;
      old.setAttribute("aria-label", fresh.getAttribute("aria-label"));
      fresh.replaceWith(old);
    }
    for (const [key, one] of folds(body)) if (open.has(key)) one.open = open.get(key);
    for (const [key, one] of scrolls(body)) {
      if (sides.get(key)) one.scrollLeft = sides.get(key);
      if (focus && focus[0] === key) one.focus({ preventScroll: true });
    }
    for (const [key, one] of folds(body)) {
      if (focus && focus[0] === key) one.firstElementChild.focus({ preventScroll: true });
    }
    const moved = body.querySelector("#layer");
    if (slider && moved) moved.value = slider.value;
    if (onSlider && moved) moved.focus({ preventScroll: true });
  }

  function sectionOf({ id, heading }) {
    const section = document.createElement("section");
    section.id = id;
    section.append(document.createElement("h2"), document.createElement("div"));
    section.firstElementChild.textContent = heading;
    section.lastElementChild.className = "body";
    return section;
  }

  async function update(content) {
    anchored(() => {
      document.title = content.title;
      document.querySelector("h1").textContent = content.title;
      document.getElementById("summary").innerHTML = content.summary;
      const wanted = new Set(content.sections.map((one) => one.id));
      for (const section of [...main.children]) if (!wanted.has(section.id)) section.remove();
      content.sections.forEach((part, place) => {
        const section = document.getElementById(part.id) || sectionOf(part);
        if (main.children[place] !== section) main.insertBefore(section, main.children[place] || null);
        if (shown[part.id] !== part.html) fill(section, part.html);
        shown[part.id] = part.html;
      });
      const links = content.sections.map((part) => {
        const link = document.createElement("a");
        link.href = "#" + part.id;
        link.textContent = part.heading;
        const item = document.createElement("li");
        item.append(link);
        return item;
      });
      const list = document.querySelector("nav ul");
      if (list.textContent !== links.map((one) => one.textContent).join("")) list.replaceChildren(...links);
    });
    if (window.report) {
      await window.report.first;
      await window.report.drawAll(content.plots, content.layers);
    }
    document.documentElement.dataset.version = content.version;
  }

  const say = (text, running) => {
    if (status.textContent !== text) status.textContent = text;
    status.dataset.running = String(running);
  };

  async function ask() {
    try {
      const answer = await fetch("data?version=" + state.version, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      const news = await answer.json();
      failures = 0;
      say(news.status, news.running);
      if (news.sections) await update(news);
      state.version = news.version;
      if (!news.running) return;
    } catch (error) {
      failures += 1;
      if (failures >= TRIES) {
        say("The server of this page has ended, and the page is as it was then; report.html in the run's directory has the end.", false);
        return;
      }
    }
    setTimeout(ask, document.hidden ? HIDDEN : PAUSE);
  }
  if (state.running) setTimeout(ask, PAUSE);
})();
