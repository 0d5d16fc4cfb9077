"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  const theme = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () =>
    document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : dark.matches;
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  dark.addEventListener("change", nameTheme);
  nameTheme();
  theme.hidden = false;

  const cards = [...document.querySelectorAll(".card")];
  const [label, kind, status, low, high] = ["label", "kind", "status", "low", "high"].map((name) => byId(`filter-${name}`));
  const fields = [label, kind, status, low, high];
  const fits = ({ dataset }) => {
    if (label.value && dataset.label !== label.value) return false;
    if (kind.value && !dataset.kinds.split(" ").includes(kind.value)) return false;
    if (status.value && dataset.status !== status.value) return false;
    if (!low.value && !high.value) return true;
    if (dataset.score === undefined) return false;
    const score = Number(dataset.score);
    return (!low.value || score >= Number(low.value)) && (!high.value || score <= Number(high.value));
  };
  const PAGE = 42;
  let most = PAGE;
  const show = () => {
    let matching = 0;
    for (const card of cards) {
      const fitting = fits(card);
      card.hidden = !fitting || matching >= most;
      matching += fitting;
    }
    byId("filter-count").textContent = `${matching} of ${cards.length} match`;
    byId("none").hidden = matching > 0;
    byId("more").hidden = matching <= most;
    byId("more").textContent = `Show more (${matching - most} left)`;
  };
  const filter = () => { most = PAGE; show(); };
  for (const field of fields) field.addEventListener("input", filter);
  const reset = () => { for (const field of fields) field.value = ""; };
  byId("filter-reset").addEventListener("click", () => { reset(); filter(); });
  byId("more").addEventListener("click", () => {
    const next = cards.filter(fits)[most];
    most += PAGE;
    show();
    next.focus();
  });
  for (const pick of document.querySelectorAll(".pick")) {
    pick.addEventListener("click", () => {
      reset();
      label.value = pick.dataset.label;
      filter();
      label.focus();
      byId("pictures").scrollIntoView();
    });
  }
  filter();
  byId("filters").hidden = false;
})();
