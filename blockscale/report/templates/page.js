// Draws every chart in the colours of the page, again when these change or another view is chosen.
"use strict";
(() => {
  const page = document.documentElement;
  page.classList.add("scripted");
  const colour = (name) => getComputedStyle(page).getPropertyValue(name).trim();

  function themed(layout) {
    const ink = colour("--ink"), line = colour("--grid");
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    for (const key of axes) {
      const drawn = { gridcolor: line, linecolor: line, zerolinecolor: line, dividercolor: line };
      Object.assign(layout[key], drawn);
    }
    return Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: {
        bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: ink }, align: "left",
      },
    });
  }

  function draw(chart) {
    const chosen = chart.querySelector("select");
    const views = chart.querySelectorAll("script[type='application/json']");
    const figure = JSON.parse(views[chosen ? chosen.selectedIndex : 0].textContent);
    const plot = chart.querySelector(".plot");
    const options = { displayModeBar: false, responsive: true };
    return Plotly.react(plot, figure.data, themed(figure.layout), options);
  }

  const charts = document.querySelectorAll(".chart");
  const drawAll = () => charts.forEach(draw);
  charts.forEach((chart) => chart.querySelector("select")?.addEventListener("change", () => draw(chart)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
